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
