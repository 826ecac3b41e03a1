"""Value checks of the flags, and the published defaults."""

import argparse
import re
import sys

import pytest

import main_lincls
import main_semisup
import main_synco
from synco import options
from synco.errors import UserError
from synco.options import architecture, number
from synco.parser import GROUPS


@pytest.mark.parametrize(
    "kind, bounds, good, bad",
    [
        (int, {"low": 1}, {"1": 1, "12": 12}, ["0", "-3", "1.5", "x", "", "nan"]),
        (float, {"low": 0, "high": 1}, {"0": 0, "1": 1, "0.25": 0.25}, ["-0.1", "1.01", "nan", "inf", "x"]),
        (float, {"above": 0}, {"1e-9": 1e-9}, ["0", "-1", "nan", "inf"]),
        (float, {"high": 1, "above": 0}, {"1": 1}, ["0", "1.1"]),
        (int, {}, {"-5": -5}, ["1e3"]),
    ],
)
def test_number(kind, bounds, good, bad):
    parse = number(kind, **bounds)
    for text, value in good.items():
        assert parse(text) == value and type(parse(text)) is kind
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a"):
            parse(text)


def test_unknown_architecture_suggests_the_nearest():
    assert architecture("resnet50") == "resnet50"
    with pytest.raises(argparse.ArgumentTypeError, match="did you mean 'resnet50'"):
        architecture("resnet_50")
    with pytest.raises(argparse.ArgumentTypeError, match="choose one of alexnet, "):
        architecture("zzzz")
    with pytest.raises(argparse.ArgumentTypeError, match="not a torchvision classification network"):
        architecture("fasterrcnn_resnet50_fpn")


def parse(monkeypatch, text):
    monkeypatch.setattr(sys, "argv", ["main_synco.py", *text.split()])
    return main_synco.parse()


def test_published_defaults(monkeypatch):
    args = vars(parse(monkeypatch, "IMAGENET"))
    published = dict(
        data="IMAGENET", arch="resnet50", workers=None, epochs=200, start_epoch=0, batch_size=256, lr=0.03,
        schedule=[120, 160], momentum=0.9, weight_decay=1e-4, print_freq=10, resume="", world_size=-1, rank=-1,
        dist_backend=None, seed=None, gpu=None, multiprocessing_distributed=False, save_dir="./", moco_dim=128,
        moco_k=65536, moco_m=0.999, moco_t=0.07, mlp=False, aug_plus=False, cos=False, n_hard=1024, n1=256, n2=256,
        n3=256, n4=64, n5=64, n6=64, sigma=0.01, delta=0.01, eta=0.01, warmup_epochs=10, alpha=0.5, beta=1.5, gamma=1.0,
        cooldown_epochs=0, img_size=224, save_freq=1, keep=0, log_dir=None, bn_splits=1, sync_bn=False,
    )  # fmt: skip
    assert {name: args[name] for name in published} == published


def test_published_command_line(monkeypatch):
    args = parse(
        monkeypatch,
        "-a resnet50 --lr 0.03 --batch-size 256 --dist-url tcp://localhost:10001 --multiprocessing-distributed "
        "--world-size 1 --rank 0 --mlp --moco-t 0.2 --aug-plus --cos --n-hard 1024 --n1 256 --n2 256 --n3 256 --n4 64 "
        "--n5 64 --n6 64 IMAGENET",
    )
    assert args.multiprocessing_distributed and args.mlp and args.cos and args.aug_plus and args.moco_t == 0.2
    args = parse(monkeypatch, "--learning-rate 1 --weight-decay 2 --schedule 3 4 --workers 5 -b 6 -p 7 -j 8 D")
    assert (args.lr, args.weight_decay, args.schedule, args.batch_size, args.workers) == (1, 2, [3, 4], 6, 8)


SHARED = {
    "identity": "limit_images hold_out split_seed arch stem img_size stats amp channels_last tf32 momentum "
    "weight_decay",
    "schedule": "epochs lr",
    "free": "data dataset train_list val_list download cache_images workers worker_timeout start_epoch batch_size "
    "print_freq resume save_dir "
    "force_resume save_steps save_minutes overwrite log_dir track seed skip_bad_images multiprocessing_distributed "
    "nproc_per_node world_size rank dist_url dist_backend gpu dist_timeout peer_timeout",
}
CLASSIFIER = {"free": "pretrained evaluate val_freq eval_train save_confusion"}
OWN = {
    main_synco: {
        "identity": "optimizer clip_grad aug aug_plus aug_heavy blur crop_scale augment_on compile sync_bn bn_splits "
        "moco_dim moco_k moco_m moco_t mlp symmetric mask_same_image n_hard n1 n2 n3 n4 n5 n6 n_copied alpha beta "
        "gamma sigma delta eta warmup_epochs cooldown_epochs fill_queue",
        "schedule": "steps schedule cos lr_min lr_warmup_epochs lr_warmup",
        "free": "save_freq keep knn_freq knn_k knn_train save_best preset init_from",
    },
    main_lincls: {"schedule": "schedule cos lr_min"},
    main_semisup: {
        "identity": "train_percent weights",
        "schedule": "lr_backbone lr_classifier",
        "free": "subset_file write_subset",
    },
}


@pytest.mark.parametrize("program", OWN, ids=lambda program: program.__name__)
def test_the_kind_of_every_flag(program):
    """What becomes of each when a run goes on: a new flag is to be thought of here, too.

    identity: what a run is; schedule: how fast and how long it learns, with --force-resume; free: all else.
    """
    expected = {}
    for table in (SHARED, {} if program is main_synco else CLASSIFIER, OWN[program]):
        expected |= {name: kind for kind, names in table.items() for name in names.split()}
    if program is main_semisup:
        del expected["lr"]  # it has two
    parser = program.flags()
    assert parser.kinds == expected
    assert {action.dest for action in parser._actions} - {"help"} == set(expected)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--moco-k 99999999999999999999", "argument --moco-k: '99999999999999999999' is beyond reason: more than 10"),
        ("--n1 1000000001", "argument --n1: '1000000001' is beyond reason"),
        ("--steps 99999999999", "argument --steps: '99999999999' is beyond reason"),
        ("--worker-timeout 9999999", "argument --worker-timeout: '9999999' is not a whole number >= 0 and <= 1000000"),
        ("--save-minutes 1e9", "argument --save-minutes: '1e9' is not a number >= 0 and <= 1000000"),
        ("--dist-timeout 1e9", "argument --dist-timeout: '1e9' is not a number > 0 and <= 1000000"),
        ("--peer-timeout 1e9", "argument --peer-timeout: '1e9' is not a number >= 4 and <= 1000000"),
        ("--warmup-epochs 99999999999999999999s", "'99999999999999999999s' is not a number of epochs"),
        ("--save-dir=", "--save-dir '': must name a folder"),
        ("--log-dir=", "--log-dir '': must name a folder"),
    ],
)
def test_what_no_run_can_mean_is_refused(monkeypatch, flags, message):
    with pytest.raises(UserError) as error:
        parse(monkeypatch, f"{flags} DATA")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_classifiers_folders_have_names(monkeypatch):
    for name in ("--save-dir", "--log-dir"):
        for program in (main_lincls, main_semisup):
            monkeypatch.setattr(sys, "argv", ["x", "--pretrained", "random", f"{name}=", "DATA"])
            with pytest.raises(UserError, match=f"^{name} '': must name a folder$"):
                program.parse()


def test_help_of_sigma_and_delta_is_their_own(monkeypatch, capsys):
    """The reference has them exchanged."""
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--sigma X type 4: standard deviation of the noise (>= 0; default: 0.01)" in text
    assert "--delta X type 5: step along the similarity's gradient (>= 0; default: 0.01)" in text


OTHERS = ("method", "synthetic negatives")  # groups that the classifiers have no flags in, but for a normal run's


@pytest.mark.parametrize("program", OWN, ids=lambda program: program.__name__)
def test_forty_lines_of_help_are_enough_for_a_normal_run(program, capsys):
    with pytest.raises(SystemExit):
        program.flags().parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" [flags] DATA") and not lines[1] and max(map(len, lines)) <= 120
    assert "a normal run:" in lines[:40]
    names = "DATA --arch --epochs --batch-size --lr --cos --mlp --moco-t --aug-plus --method --amp --knn-freq --resume"
    if program is not main_synco:
        names = "DATA --pretrained --arch --epochs --batch-size --lr --wd --amp --resume"
    for name in (*names.split(), "--multiprocessing-distributed", "--save-dir"):
        assert any(name in line for line in lines[lines.index("a normal run:") : 40]), name
    titles = [line.removesuffix(":") for line in lines[lines.index("a normal run:") + 1 :] if re.match(r"\w", line)]
    assert titles == [name for name in GROUPS if program is main_synco or name not in OTHERS]


def test_help_has_every_flag_once_with_its_range(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--help")
    text = capsys.readouterr().out
    flags = main_synco.flags()
    for action in flags._actions:
        names = ", ".join(action.option_strings) or "DATA"
        assert len(re.findall(rf"^  {names}(?= |$)", text, re.M)) == 1, names
    words = " ".join(text.split())
    for line in (
        "--moco-m X momentum of the key encoder (>= 0 and <= 1; default: 0.999)",
        "-b, --batch-size N per node, shared by its processes (>= 1; default: 256)",
        "--schedule [N ...] epochs that divide the lr by 10 (>= 0; default: 120 160)",
        "--crop-scale MIN,MAX crop area (unset: 0.2,1; heavy: 0.5,1) (0 < MIN <= MAX <= 1)",
        "0,0.5,1,2,2,2 (>= 0; default: 10)",
        "--clip-grad NORM largest norm of the gradient (> 0)",
    ):
        assert line in words


def test_second_names_mean_the_published_flags(monkeypatch):
    for second, published in (
        ("--synth-start 0,0.5,1,2,2,2", "--warmup-epochs 0,0.5,1,2,2,2"),
        ("--aug v1", ""),
        ("--aug v2 --blur", "--aug-plus --blur"),
        ("--aug heavy", "--aug-heavy"),
        ("--aug v2 --aug-plus", "--aug-plus"),
        ("--aug heavy --method mochi", "--aug-heavy --method mochi"),
    ):
        assert vars(parse(monkeypatch, f"{second} D")) == vars(parse(monkeypatch, f"{published} D"))


@pytest.mark.parametrize(
    "flags", ["--aug v1 --aug-plus", "--aug heavy --aug-plus", "--aug v1 --aug-heavy", "--aug v2 --aug-heavy"]
)
def test_contradicting_names_of_the_augmentation(monkeypatch, flags):
    _, kind, other = flags.split()
    with pytest.raises(UserError, match=f"^--aug {kind} and {other} contradict each other$"):
        parse(monkeypatch, f"{flags} D")


@pytest.mark.parametrize(
    "text, value",
    [("10", 10), ("2.0", 2), ("0.5", 0.5), ("2500s", "2500s"), ("0,0.5,1,2,2,2", [0, 0.5, 1, 2, 2, 2])],
)
def test_lengths_in_epochs_and_steps(text, value):
    assert options.lengths(6)(text) == value


@pytest.mark.parametrize(
    "text, message",
    [
        ("-1", "'-1' is not a number of epochs >= 0, or of steps, such as 2500s"),
        ("0,1,2,-3,4,5", "'-3' is not a number of epochs >= 0"),
        ("1,2,3", "'1,2,3' are 3 numbers, where 1 or 6 are wanted"),
        ("1.5s", "'1.5s' is not"),
        ("", "'' is not"),
        ("nan", "'nan' is not"),
    ],
)
def test_wrong_lengths(text, message):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        options.lengths(6)(text)
    assert message in str(error.value)


def test_lengths_become_epochs():
    assert options.in_epochs(2.5, 7) == 2.5 and options.in_epochs("14s", 7) == 2.0


def test_a_pair_of_numbers():
    assert options.pair(0, 1)("0.08,1") == [0.08, 1.0]
    for text in ("0.5", "0,1", "0.5,0.2", "0.5,1.1", "a,b", "0.2,nan", "0.1,0.2,0.3"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not MIN,MAX with 0 < MIN <= MAX <= 1"):
            options.pair(0, 1)(text)


def test_what_is_unset_is_the_checkpoints_or_the_data_sets():
    def resolved(dataset, config=None, **given):
        args = argparse.Namespace(dataset=dataset, **{"stem": None, "img_size": None, "stats": None} | given)
        before = dict(vars(args))
        found = options.resolve_image_settings(args, "x.tar", config)
        assert vars(args) == before
        return found["stem"], found["img_size"], found["stats"]

    assert resolved("imagefolder") == ("imagenet", 224, "imagenet") == resolved("caltech256")
    assert resolved("cifar10") == ("imagenet", 32, "cifar10") and resolved("stl10") == ("imagenet", 96, "stl10")
    config = {"stem": "cifar", "img_size": 40, "stats": "cifar100", "lr": 3}
    assert resolved("cifar10", config) == ("cifar", 40, "cifar100")
    assert resolved("cifar10", config, img_size=64, stats="imagenet") == ("cifar", 64, "imagenet")
    assert resolved("cifar10", {"img_size": 48}) == ("imagenet", 48, "cifar10")  # an older checkpoint's
    for name, value in (("stem", "x"), ("img_size", "32"), ("img_size", 10**9), ("stats", ["cifar10"])):
        with pytest.raises(UserError, match=f"x.tar: its {name} is "):
            resolved("cifar10", {name: value})


def test_networks_of_timm(monkeypatch):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(argparse.ArgumentTypeError, match="'timm:resnet18' needs the package timm: pip install timm"):
        architecture("timm:resnet18")
    monkeypatch.undo()
    pytest.importorskip("timm")
    assert architecture("timm:efficientnet_b2") == "timm:efficientnet_b2"
    with pytest.raises(
        argparse.ArgumentTypeError, match="'timm:resnet_18' is not a timm network; did you mean 'resnet18"
    ):
        architecture("timm:resnet_18")
