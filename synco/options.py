"""Command-line flags: the parser, value checks, and the flags that several scripts share, each declared once."""

import argparse
import difflib
import importlib.util
import math
import os

import torchvision


class UserError(ValueError):
    """A mistake of the user's: the launcher prints its one line on stderr and exits with status 2."""


class Failure(Exception):
    """What ends a run through no mistake of the user's, a full disk for instance: one line on stderr, status 1."""


# mean and standard deviation of a data set's training images, in [0, 1]: what images are normalised with
STATS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # MoCo's
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
}
# --dataset: (whose STATS, side of its crops in pixels)
DATASETS = {
    "imagefolder": ("imagenet", 224),
    "cifar10": ("cifar10", 32),
    "cifar100": ("cifar100", 32),
    "stl10": ("stl10", 96),
    "imagenette": ("imagenet", 224),
    "caltech256": ("imagenet", 224),
}
STEMS = ("imagenet", "cifar")
LARGEST = 10_000  # pixels of an image's side: no file's word may have a network of any size built

# flags that may differ between a run and its continuation without a word; what follows from them is compared
UNRELATED = set(
    "data download cache_images workers resume overwrite save_dir log_dir print_freq start_epoch deterministic seed "
    "batch_size processes save_steps save_minutes force_resume skip_bad_images worker_timeout dist_timeout "
    "peer_timeout restarted "
    "world_size rank dist_url dist_backend gpu multiprocessing_distributed nproc_per_node".split()
)
# and those that --force-resume lets differ: how fast and how long it learns, not what
FORCED = set("lr lr_backbone lr_classifier lr_min lr_warmup lr_warmup_epochs schedule cos epochs steps".split())


def compare(before, args, path, unrelated=UNRELATED):
    """What a continuation changes with --force-resume, compared with the stored settings: ["lr 0.03 → 0.5", ...].

    before: the settings in the checkpoint `path`, {} in one that stores none. Raises UserError that lists all that
    differs and may not.
    """
    now = {name: value for name, value in vars(args).items() if name in before and name not in unrelated}
    differ = {
        name: f"{name} {before[name]} → {value}"
        for name, value in now.items()
        if not isinstance(before[name], (type(value), int, float)) or before[name] != value  # a file may hold anything
    }
    if "train_images_crc32" in differ:  # numbers that say nothing
        differ["train_images_crc32"] = "other training images (by their names)"
        if "train_images" in differ:
            del differ["train_images_crc32"]
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


def pair(low, high):
    """An argparse type: two numbers MIN,MAX with low < MIN <= MAX <= high."""

    def parse(text):
        try:
            least, greatest = map(float, text.split(","))
        except ValueError:
            least = greatest = math.nan
        if not low < least <= greatest <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not MIN,MAX with {low} < MIN <= MAX <= {high}")
        return [least, greatest]

    return parse


def length(text):
    """An argparse type: a number of epochs, fractions allowed, or of steps with an s after it, such as "2500s"."""
    try:
        if text.endswith("s"):
            return f"{number(int, 0)(text[:-1])}s"
        epochs = number(float, 0)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of epochs >= 0, or of steps, such as 2500s"
        ) from error
    return int(epochs) if epochs == int(epochs) else epochs


def in_epochs(length, steps):
    """A `length` as epochs, of `steps` steps each."""
    return int(length[:-1]) / steps if isinstance(length, str) else length


def lengths(count):
    """An argparse type: one `length`, or `count` of them with commas → that one, or a list."""

    def parse(text):
        found = [length(part) for part in text.split(",")]
        if len(found) not in (1, count):
            raise argparse.ArgumentTypeError(f"{text!r} are {len(found)} numbers, where 1 or {count} are wanted")
        return found[0] if len(found) == 1 else found

    return parse


def architecture(name):
    """An argparse type: the name of one of torchvision's classification networks, or timm:NAME for one of timm's."""
    if name.startswith("timm:"):
        if importlib.util.find_spec("timm") is None:
            raise argparse.ArgumentTypeError(f"{name!r} needs the package timm: pip install timm")
        import timm  # an optional package, used for these networks alone

        kind, name = "timm", name.removeprefix("timm:")
        known, names = timm.is_model(name), timm.list_models()
    else:
        kind, names = "torchvision classification", torchvision.models.list_models(module=torchvision.models)
        known = name in names
    given = f"timm:{name}" if kind == "timm" else name
    if not known:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        listed = f"choose one of {', '.join(names)}" if kind != "timm" else "timm.list_models() lists them"
        hint = f"did you mean {near[0]!r}?" if near else listed
        raise argparse.ArgumentTypeError(f"{given!r} is not a {kind} network; {hint}")
    return given


def add_data(parser, *, positional=True):
    """What to read and with which network: DATA unless it comes another way, data set, image size, workers, network."""
    flag = parser.add_argument
    if positional:
        flag(
            "data",
            metavar="DATA",
            help="folder in ImageNet's layout, train/CLASS/IMAGE and val/CLASS/IMAGE; or where --dataset's files lie",
        )
    flag("--dataset", default="imagefolder", choices=DATASETS, help="DATA's layout, or one of torchvision's data sets")
    flag("--download", action="store_true", help="fetch the --dataset into DATA if it is not there")
    flag("--cache-images", action="store_true", help="keep the decoded images in memory, if they fit")
    flag("--limit-images", type=number(int, 1), metavar="N", help="of each split N images, class-balanced: for trials")
    flag("--hold-out", type=number(int, 1), metavar="N", help="N training images, class-balanced, in place of val")
    flag("--split-seed", default=0, type=number(int, 0), help="of these two choices, and of Caltech-256's val")
    flag("-a", "--arch", default="resnet50", type=architecture, help="torchvision classification network, or timm:NAME")
    flag("--stem", choices=STEMS, help="a ResNet's: ImageNet's, or for small images 3x3, stride 1 and no max-pool")
    flag("--img-size", type=number(int, 8, LARGEST), help="side of the square crops (unset: by --dataset, 224 or less)")
    flag("--stats", choices=STATS, help="whose mean and deviation normalise the images (unset: those of --dataset)")
    flag("-j", "--workers", default=32, type=number(int, 0), help="loading workers per node, capped at its CPUs")
    flag(
        "--worker-timeout", default=600, type=number(int, 0), help="seconds to wait for a batch of images; 0: for ever"
    )


def add_speed(parser):
    """How the network computes, see `precision.Precision`."""
    flag = parser.add_argument
    flag("--amp", default="off", choices=("off", "bf16", "fp16"), help="precision of the network's forward pass")
    flag(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="images and weights in the memory layout that tensor cores read",
    )
    flag(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        help="TensorFloat-32 for float32 products and convolutions (unset: torch's choice, convolutions only)",
    )


def check_data(args):
    """Raise UserError where the flags of `add_data` contradict each other."""
    if args.download and args.dataset == "imagefolder":
        raise UserError(f"--download: name what to fetch with --dataset {{{','.join(list(DATASETS)[1:])}}}")


def settle(args, path="", config=None):
    """Give --stem, --img-size and --stats their values where they are unset.

    path, config: a checkpoint's and its settings, which decide then; else --dataset does.
    Raises UserError if those settings are nothing that can be.
    """
    stats, size = DATASETS[args.dataset]
    config = config or {}
    found = {"stem": "imagenet", "img_size": size, "stats": stats}
    found |= {name: config[name] for name in found if config.get(name) is not None}
    for name, good, wanted in (
        ("stem", found["stem"] in STEMS, f"one of {', '.join(STEMS)}"),
        ("img_size", isinstance(found["img_size"], int) and 1 <= found["img_size"] <= LARGEST, "a number of pixels"),
        ("stats", isinstance(found["stats"], str) and found["stats"] in STATS, f"one of {', '.join(STATS)}"),
    ):
        if getattr(args, name) is None:
            if not good:
                raise UserError(f"{path}: its {name} is {found[name]!r}, not {wanted}")
            setattr(args, name, found[name])


def add_run(parser, *, epochs, batch_size, save_dir, steps=False):
    """Length (in `steps`, too, if asked), reporting and output of a run; the defaults are the script's own."""
    flag = parser.add_argument
    lasting = parser.add_mutually_exclusive_group()
    lasting.add_argument("--epochs", default=epochs, type=number(int, 1), help="epochs to run")
    if steps:
        lasting.add_argument("--steps", type=number(int, 1), help="steps to run, in place of --epochs")
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
    """Raise UserError where the flags of `add_data` and `add_run` contradict each other."""
    check_data(args)
    if not getattr(args, "steps", None):
        check_start(args)
    if args.overwrite and args.resume == "auto":
        raise UserError(
            "--overwrite starts anew and --resume auto goes on; give one (--resume '' takes a script's back)"
        )


def check_start(args):
    """Raise UserError unless --start-epoch is one of the run's; with --steps, once args.epochs holds their number."""
    if args.start_epoch >= args.epochs:
        steps = getattr(args, "steps", None)
        length = f"{args.epochs}, which --steps {steps} make" if steps else f"--epochs {args.epochs}"
        raise UserError(f"--start-epoch {args.start_epoch} must be below {length}")


def add_classifier(parser):
    """What the linear probe and the fine-tuning have in common."""
    flag = parser.add_argument
    flag(
        "--pretrained",
        metavar="PATH",
        help="checkpoint of SynCo or MoCo, or a torchvision network's weights; 'random': untrained, as a baseline",
    )
    flag("-e", "--evaluate", action="store_true", help="only validate the classifier that --resume names")
    flag(
        "--val-freq", default=1, type=number(int, 0), metavar="N", help="epochs between validations; 0: after the last"
    )
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
