"""Value checks of the flags, and the published defaults."""

import argparse
import sys

import pytest

import main_synco
from synco import options
from synco.options import UserError, architecture, number


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
        data="IMAGENET", arch="resnet50", workers=32, epochs=200, start_epoch=0, batch_size=256, lr=0.03,
        schedule=[120, 160], momentum=0.9, weight_decay=1e-4, print_freq=10, resume="", world_size=-1, rank=-1,
        dist_backend=None, seed=None, gpu=None, multiprocessing_distributed=False, save_dir="./", moco_dim=128,
        moco_k=65536, moco_m=0.999, moco_t=0.07, mlp=False, aug_plus=False, cos=False, n_hard=1024, n1=256, n2=256,
        n3=256, n4=64, n5=64, n6=64, sigma=0.01, delta=0.01, eta=0.01, warmup_epochs=10, alpha=0.5, beta=1.5, gamma=1.0,
        cooldown_epochs=0, img_size=224, save_freq=1, keep=0, log_dir="./", bn_splits=1, sync_bn=False,
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


def test_help_of_sigma_and_delta_is_their_own(monkeypatch, capsys):
    """The reference has them exchanged."""
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--sigma SIGMA type 4: standard deviation of the noise (default: 0.01)" in text
    assert "--delta DELTA type 5: step along the similarity's gradient (default: 0.01)" in text


def test_the_parser_knows_no_abbreviations():
    parser = options.Parser("")
    parser.add_argument("--batch-size")
    with pytest.raises(UserError, match="unrecognized arguments: --batch 3"):
        parser.parse_args(["--batch", "3"])


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
    def settled(dataset, config=None, **given):
        args = argparse.Namespace(dataset=dataset, **{"stem": None, "img_size": None, "stats": None} | given)
        options.settle(args, "x.tar", config)
        return args.stem, args.img_size, args.stats

    assert settled("imagefolder") == ("imagenet", 224, "imagenet") == settled("caltech256")
    assert settled("cifar10") == ("imagenet", 32, "cifar10") and settled("stl10") == ("imagenet", 96, "stl10")
    config = {"stem": "cifar", "img_size": 40, "stats": "cifar100", "lr": 3}
    assert settled("cifar10", config) == ("cifar", 40, "cifar100")
    assert settled("cifar10", config, img_size=64, stats="imagenet") == ("cifar", 64, "imagenet")
    assert settled("cifar10", {"img_size": 48}) == ("imagenet", 48, "cifar10")  # an older checkpoint's
    for name, value in (("stem", "x"), ("img_size", "32"), ("img_size", 10**9), ("stats", ["cifar10"])):
        with pytest.raises(UserError, match=f"x.tar: its {name} is "):
            settled("cifar10", {name: value})


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
