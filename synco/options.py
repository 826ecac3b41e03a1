"""Command-line flags: the parser, value checks, and the flags that several scripts share, each declared once."""

import argparse
import difflib
import os

import torchvision


class UserError(ValueError):
    """A mistake of the user's: the launcher prints its one line on stderr and exits with status 2."""


class Failure(Exception):
    """What ends a run through no mistake of the user's, a full disk for instance: one line on stderr, status 1."""


# flags that may differ between a run and its continuation without a word; what follows from them is compared
UNRELATED = set(
    "data workers resume overwrite save_dir log_dir print_freq start_epoch deterministic seed batch_size processes "
    "save_steps save_minutes force_resume skip_bad_images worker_timeout dist_timeout peer_timeout restarted "
    "world_size rank dist_url dist_backend gpu multiprocessing_distributed nproc_per_node".split()
)
# and those that --force-resume lets differ: how fast and how long it learns, not what
FORCED = set("lr lr_backbone lr_classifier lr_min schedule cos epochs".split())


def compare(before, args, path, unrelated=UNRELATED):
    """What a continuation changes with --force-resume, compared with the stored settings: ["lr 0.03 → 0.5", ...].

    before: the settings in the checkpoint `path`, {} in one that stores none. Raises UserError that lists all that
    differs and may not.
    """
    now = {name: value for name, value in vars(args).items() if name in before and name not in unrelated}
    differ = {name: f"{name} {before[name]} → {value}" for name, value in now.items() if before[name] != value}
    allowed = [name for name in differ if name in FORCED]
    if len(allowed) == len(differ) and args.force_resume:
        return list(differ.values())
    if differ:
        hint = f" (--force-resume lets {', '.join(allowed)} change)" if allowed else ""
        raise UserError(f"{path}: is of a run with other settings: {'; '.join(differ.values())}{hint}")
    return []


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and every flag's default where there is one."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default in ("", argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: {' '.join(map(str, default)) if isinstance(default, list) else '%(default)s'})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, raised as `UserError`, and that takes no abbreviated flags."""

    def __init__(self, docstring):
        super().__init__(description=docstring, formatter_class=_Help, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def number(kind, low=None, high=None, *, above=None):
    """An argparse type: an int or float (`kind`) with low <= value <= high, or value > above."""
    bounds = [f">= {low}"] if low is not None else []
    bounds += [f"> {above}"] if above is not None else []
    bounds += [f"<= {high}"] if high is not None else []
    wanted = {int: "a whole number", float: "a number"}[kind] + (" " + " and ".join(bounds) if bounds else "")

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        # written so that NaN fails, whatever the bounds are
        inside = value is not None and value == value and abs(value) != float("inf")
        inside = inside and (low is None or value >= low) and (high is None or value <= high)
        if not (inside and (above is None or value > above)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def architecture(name):
    """An argparse type: the name of one of torchvision's classification networks."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"{name!r} is not a torchvision classification network; {hint}")
    return name


def add_data(parser):
    """What to read: the data folder, the network's name, the image size, the loading workers."""
    flag = parser.add_argument
    flag("data", metavar="DATA", help="folder in ImageNet's layout: train/CLASS/IMAGE, val/CLASS/IMAGE")
    flag("-a", "--arch", default="resnet50", type=architecture, help="torchvision classification network")
    flag("--img-size", default=224, type=number(int, 8), help="side of the square crops, in pixels")
    flag("-j", "--workers", default=32, type=number(int, 0), help="loading workers per node, capped at its CPUs")
    flag(
        "--worker-timeout", default=600, type=number(int, 0), help="seconds to wait for a batch of images; 0: for ever"
    )


def add_run(parser, *, epochs, batch_size, save_dir):
    """Length, reporting and output of a run; the defaults are the script's own."""
    flag = parser.add_argument
    flag("--epochs", default=epochs, type=number(int, 1), help="epochs to run")
    flag("--start-epoch", default=0, type=number(int, 0), help="epoch to start at; --resume sets it")
    flag("-b", "--batch-size", default=batch_size, type=number(int, 1), help="per node, shared by its processes")
    flag("-p", "--print-freq", default=10, type=number(int, 1), help="steps between progress lines")
    flag("--resume", default="", metavar="PATH", help="checkpoint to go on from; 'auto': the newest in --save-dir")
    beside = "" if save_dir else " (unset: a folder beside the checkpoint, named after the run)"
    flag("--save-dir", default=save_dir, metavar="FOLDER", help=f"folder for checkpoints and config.json{beside}")
    flag("--force-resume", action="store_true", help="go on with another learning rate, schedule or number of epochs")
    flag("--save-steps", default=0, type=number(int, 0), help="steps between saves within an epoch; 0: none")
    flag("--save-minutes", default=0.0, type=number(float, 0), help="minutes between such saves; 0: none")
    flag("--overwrite", action="store_true", help="start anew in a --save-dir that holds a run, and remove that run")
    flag("--log-dir", metavar="FOLDER", help="folder for TensorBoard and log.jsonl (unset: the save folder)")
    flag(
        "--seed", type=number(int, 0, 2**32 - 1), help="of every random draw (unset: one is drawn, printed and stored)"
    )


def add_skipping(parser):
    """What to do about training images that cannot be read."""
    parser.add_argument(
        "--skip-bad-images",
        default=0,
        type=number(int, 0),
        metavar="N",
        help="training images that cannot be read and are replaced by the next; more end the run",
    )


def check_run(args):
    """Raise UserError where the flags of `add_run` contradict each other."""
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch} must be below --epochs {args.epochs}")
    if args.overwrite and args.resume == "auto":
        raise UserError(
            "--overwrite starts anew and --resume auto goes on; give one (--resume '' takes a script's back)"
        )


def add_classifier(parser):
    """What the linear probe and the fine-tuning have in common."""
    flag = parser.add_argument
    flag(
        "--pretrained",
        metavar="PATH",
        help="checkpoint of SynCo or MoCo, or a torchvision network's weights; 'random': untrained, as a baseline",
    )
    flag("-e", "--evaluate", action="store_true", help="only validate the classifier that --resume names")
    flag("--eval-train", action="store_true", help="validate on the training images, too")
    flag("--save-confusion", action="store_true", help="write confusion.csv: a row a class, a column a prediction")
    flag("--momentum", default=0.9, type=number(float, 0), help="momentum of SGD")


def add_distributed(parser):
    """Processes and devices, under MoCo's names; see `distributed.launch`."""
    flag = parser.add_argument
    flag("--multiprocessing-distributed", action="store_true", help="start a process per GPU of this node")
    flag("--nproc-per-node", type=number(int, 1), help="processes to start so (unset: the GPUs, or 1 on a CPU)")
    flag("--world-size", default=-1, type=number(int, -1), help="nodes; processes if they are started one by one")
    flag("--rank", default=-1, type=number(int, -1), help="of this node; of this process if started by itself")
    flag("--dist-url", metavar="URL", help="where they meet: tcp://HOST:PORT or env:// (unset: a free port here)")
    flag("--dist-backend", choices=("nccl", "gloo"), help="unset: nccl on GPUs, gloo on a CPU")
    flag("--gpu", type=number(int, 0), help="the one GPU to use")
    flag("--dist-timeout", type=number(float, above=0), metavar="SECONDS", help="for processes to meet in a collective "
         "(unset: torch's own)")  # fmt: skip
    flag("--peer-timeout", default=40.0, type=number(float, 4), metavar="SECONDS", help="without a sign of life from "
         "a process until the others end")  # fmt: skip


def usable_cpus():
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
