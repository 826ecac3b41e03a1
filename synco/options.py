"""Command-line flags: value checks, and the flags that several scripts share, each declared once."""

import argparse
import difflib
import importlib.util
import math
from collections.abc import Callable

from synco.errors import UserError
from synco.parser import Parser
from synco.track import TRACKERS, tracker

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
    "imagenet": ("imagenet", 224),
    "shards": ("imagenet", 224),
    "cifar10": ("cifar10", 32),
    "cifar100": ("cifar100", 32),
    "stl10": ("stl10", 96),
    "imagenette": ("imagenet", 224),
    "caltech256": ("imagenet", 224),
}
LAYOUTS = ("imagefolder", "imagenet", "shards")  # of images of one's own; the others are torchvision's
STEMS = ("imagenet", "cifar")
LONGEST = 1_000_000  # seconds, or minutes: what the system's own waiting takes
LARGEST = 10_000  # pixels of an image's side: no file's word may have a network of any size built


class Several(argparse.Action):
    """Of a flag with nargs="+": one value as it is, several as a list; no two may be equal."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: list[float],
        option_string: str | None = None,
    ) -> None:
        names = [f"{value:.12g}" for value in values]
        for name in names:
            if names.count(name) > 1:
                raise argparse.ArgumentError(self, f"{name} is given twice")
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def listed(value: float | list[float]) -> list[float]:
    """The values of a flag that takes `Several`."""
    return value if isinstance(value, list) else [value]


def number(kind: type, low: float | None = None, high: float | None = None, *, above: float | None = None) -> Callable:
    """An argparse type: an int or float (`kind`) with low <= value <= high, or value > above.

    No whole number may exceed 10**9 in any case: none here has a reason to.
    """
    bounds = [f">= {low}"] if low is not None else []
    bounds += [f"> {above}"] if above is not None else []
    bounds += [f"<= {high}"] if high is not None else []
    bounds = " and ".join(bounds)
    wanted = " ".join(filter(None, ({int: "a whole number", float: "a number"}[kind], bounds)))

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if high is None and kind is int and value is not None and value > 10**9:
            raise argparse.ArgumentTypeError(f"{text!r} is beyond reason: more than {10**9}")
        # written so that NaN fails, whatever the bounds are
        inside = value is not None and value == value and abs(value) != float("inf")
        inside = inside and (low is None or value >= low) and (high is None or value <= high)
        if not (inside and (above is None or value > above)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    parse.range, parse.metavar = bounds, {int: "N", float: "X"}[kind]  # for --help
    return parse


def pair(low: float, high: float) -> Callable:
    """An argparse type: two numbers MIN,MAX with low < MIN <= MAX <= high."""

    def parse(text):
        try:
            least, greatest = map(float, text.split(","))
        except ValueError:
            least = greatest = math.nan
        if not low < least <= greatest <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not MIN,MAX with {parse.range}")
        return [least, greatest]

    parse.range = f"{low} < MIN <= MAX <= {high}"
    return parse


def length(text: str) -> int | float | str:
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


length.range, length.metavar = ">= 0", "N"


def in_epochs(length: int | float | str, steps: int) -> float:
    """A `length` as epochs, of `steps` steps each."""
    return int(length[:-1]) / steps if isinstance(length, str) else length


def lengths(count: int) -> Callable:
    """An argparse type: one `length`, or `count` of them with commas → that one, or a list."""

    def parse(text):
        found = [length(part) for part in text.split(",")]
        if len(found) not in (1, count):
            raise argparse.ArgumentTypeError(f"{text!r} are {len(found)} numbers, where 1 or {count} are wanted")
        return found[0] if len(found) == 1 else found

    parse.range, parse.metavar = ">= 0", "N"
    return parse


def architecture(name: str) -> str:
    """An argparse type: the name of one of torchvision's classification networks, or timm:NAME for one of timm's."""
    if name.startswith("timm:"):
        if importlib.util.find_spec("timm") is None:
            raise argparse.ArgumentTypeError(f"{name!r} needs the package timm: pip install timm")
        import timm  # an optional package, used for these networks alone

        kind, name = "timm", name.removeprefix("timm:")
        known, names = timm.is_model(name), timm.list_models()
    else:
        import torchvision  # takes seconds: for the programs alone that have networks

        kind, names = "torchvision classification", torchvision.models.list_models(module=torchvision.models)
        known = name in names
    given = f"timm:{name}" if kind == "timm" else name
    if not known:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        listed = f"choose one of {', '.join(names)}" if kind != "timm" else "timm.list_models() lists them"
        hint = f"did you mean {near[0]!r}?" if near else listed
        raise argparse.ArgumentTypeError(f"{given!r} is not a {kind} network; {hint}")
    return given


def add_data(parser: Parser, *, positional: bool = True, unlabelled: bool = False) -> None:
    """What to read and with which network: DATA unless it comes another way, data set, image size, workers, network.

    unlabelled: whether images without labels will do.
    """
    identity, free = parser.identity, parser.free
    with parser.group("data and network"):
        if positional:
            other = "or of images without labels, " if unlabelled else ""
            where = f"folder of train/CLASS/IMAGE and val/CLASS/IMAGE, {other}or --dataset's own"
            free("data", metavar="DATA", help=where)
        layout = "DATA's layout (imagenet: in any form; shards: WebDataset's tar files), or a data set of torchvision's"
        free("--dataset", default="imagefolder", choices=DATASETS, help=layout)
        for split in ("train", "val"):
            line = f"list of the {split} images: a path a line, absolute or in DATA, and perhaps a label after a comma"
            free(f"--{split}-list", metavar="FILE", help=line)
        free("--download", action="store_true", help="fetch the --dataset into DATA if it is not there")
        line = "of each split N images, class-balanced: for trials"
        identity("--limit-images", type=number(int, 1), help=line)
        identity("--hold-out", type=number(int, 1), help="N training images, class-balanced, in place of val")
        identity("--split-seed", default=0, type=number(int, 0), help="of these two choices, and of Caltech-256's val")
        network = "torchvision classification network, or timm:NAME"
        identity("-a", "--arch", default="resnet50", type=architecture, metavar="NAME", help=network)
        line = "a ResNet's: ImageNet's, or for small images 3x3, stride 1 and no max-pool"
        identity("--stem", choices=STEMS, help=line)
        line = "side of the square crops (unset: by --dataset, 224 or less)"
        identity("--img-size", type=number(int, 8, LARGEST), help=line)
        line = "whose mean and deviation normalise the images (unset: those of --dataset)"
        identity("--stats", choices=STATS, help=line)
    with parser.group("speed"):
        free("--cache-images", action="store_true", help="keep the decoded images in memory, if they fit")
        line = "loading workers per node, at most its CPUs (unset: as many)"
        free("-j", "--workers", type=number(int, 0), help=line)
        waiting = "seconds to wait for a batch of images; 0: for ever"
        free("--worker-timeout", default=600, type=number(int, 0, LONGEST), help=waiting)


def add_speed(parser: Parser) -> None:
    """How the network computes, see `precision.Precision`."""
    identity, switch = parser.identity, argparse.BooleanOptionalAction
    with parser.group("speed"):
        identity("--amp", default="off", choices=("off", "bf16", "fp16"), help="precision of the forward pass")
        layout = "images and weights in the memory layout that tensor cores read"
        identity("--channels-last", action=switch, default=False, help=layout)
        products = "TensorFloat-32 for float32 products and convolutions (unset: torch's choice, convolutions only)"
        identity("--tf32", action=switch, help=products)


def check_data(args: argparse.Namespace) -> None:
    """Raise UserError where the flags of `add_data` contradict each other."""
    if args.download and args.dataset in LAYOUTS:
        named = [name for name in DATASETS if name not in LAYOUTS]
        raise UserError(f"--download: name what to fetch with --dataset {{{','.join(named)}}}")
    for flag, path in (("--train-list", args.train_list), ("--val-list", args.val_list)):
        if path == "":
            raise UserError(f"{flag} '': must name a list")
        if path is not None and args.dataset != "imagefolder":
            raise UserError(f"{flag} {path}: lists files of one's own; --dataset {args.dataset} does without")


def resolve_image_settings(args: argparse.Namespace, path: str = "", config: dict | None = None) -> dict:
    """{"stem", "img_size", "stats"}: as the flags say, else as a checkpoint does, else as --dataset does.

    path, config: the checkpoint's and its settings. Raises UserError if those settings are nothing that can be.
    """
    stats, size = DATASETS[args.dataset]
    resolved = {"stem": "imagenet", "img_size": size, "stats": stats}
    resolved |= {name: value for name in resolved if (value := (config or {}).get(name)) is not None}
    for name, good, wanted in (
        ("stem", resolved["stem"] in STEMS, f"one of {', '.join(STEMS)}"),
        (
            "img_size",
            isinstance(resolved["img_size"], int) and 1 <= resolved["img_size"] <= LARGEST,
            "a number of pixels",
        ),
        ("stats", isinstance(resolved["stats"], str) and resolved["stats"] in STATS, f"one of {', '.join(STATS)}"),
    ):
        if getattr(args, name) is not None:
            resolved[name] = getattr(args, name)
        elif not good:
            raise UserError(f"{path}: its {name} is {resolved[name]!r}, not {wanted}")
    return resolved


def add_run(parser: Parser, *, epochs: int, batch_size: int, save_dir: str | None, steps: bool = False) -> None:
    """Length (in `steps`, too, if asked), reporting and output of a run; the defaults are the script's own."""
    schedule, free = parser.schedule, parser.free
    with parser.group("optimisation"):
        lasting = parser.add_mutually_exclusive_group()
        schedule("--epochs", group=lasting, default=epochs, type=number(int, 1), help="epochs to run")
        if steps:
            schedule("--steps", group=lasting, type=number(int, 1), help="steps to run, in place of --epochs")
        free("-b", "--batch-size", default=batch_size, type=number(int, 1), help="per node, shared by its processes")
        line = "of every random draw (unset: one is drawn, printed and stored)"
        free("--seed", type=number(int, 0, 2**32 - 1), help=line)
    with parser.group("saving and resuming"):
        beside = "" if save_dir else " (unset: a folder beside the checkpoint, named after the run)"
        free("--save-dir", default=save_dir, metavar="FOLDER", help=f"folder for checkpoints and config.json{beside}")
        free("--resume", default="", metavar="PATH", help="checkpoint to go on from; 'auto': the newest in --save-dir")
        line = "go on with another learning rate, schedule or number of epochs"
        free("--force-resume", action="store_true", help=line)
        free("--start-epoch", default=0, type=number(int, 0), help="epoch to start at; --resume sets it")
        free("--overwrite", action="store_true", help="start anew in a --save-dir that holds a run, and remove it")
        free("--save-steps", default=0, type=number(int, 0), help="steps between saves within an epoch; 0: none")
        free("--save-minutes", default=0.0, type=number(float, 0, LONGEST), help="minutes between such saves; 0: none")
        free("--log-dir", metavar="FOLDER", help="folder for TensorBoard and log.jsonl (unset: the save folder)")
        free("--track", type=tracker, metavar="NAME", help=f"give the log to a tracker, too: {', '.join(TRACKERS)}")
        free("-p", "--print-freq", default=10, type=number(int, 1), help="steps between progress lines")


def add_skipping(parser: Parser) -> None:
    """What to do about training images that cannot be read."""
    what = "training images that cannot be read and are replaced by the next; more end the run"
    with parser.group("data and network"):
        parser.free("--skip-bad-images", default=0, type=number(int, 0), help=what)


def check_run(args: argparse.Namespace) -> None:
    """Raise UserError where the flags of `add_data` and `add_run` contradict each other."""
    check_data(args)
    for flag, folder in (("--save-dir", args.save_dir), ("--log-dir", args.log_dir)):
        if folder == "":
            raise UserError(f"{flag} '': must name a folder")
    if not getattr(args, "steps", None):
        check_start(args, args.epochs)
    if args.overwrite and args.resume == "auto":
        raise UserError(
            "--overwrite starts anew and --resume auto goes on; give one (--resume '' takes a script's back)"
        )


def check_start(args: argparse.Namespace, epochs: int) -> None:
    """Raise UserError unless --start-epoch is one of the run's `epochs`, which with --steps depend on the images."""
    if args.start_epoch >= epochs:
        steps = getattr(args, "steps", None)
        length = f"{epochs}, which --steps {steps} make" if steps else f"--epochs {epochs}"
        raise UserError(f"--start-epoch {args.start_epoch} must be below {length}")


def add_classifier(parser: Parser) -> None:
    """What the linear probe and the fine-tuning have in common."""
    free = parser.free
    with parser.group("method"):
        weights = "checkpoint of SynCo or MoCo, or a torchvision network's weights; 'random': untrained, as a baseline"
        free("--pretrained", metavar="PATH", help=weights)
    with parser.group("evaluation while training"):
        free("-e", "--evaluate", action="store_true", help="only validate the classifier that --resume names")
        free("--val-freq", default=1, type=number(int, 0), help="epochs between validations; 0: after the last")
        free("--eval-train", action="store_true", help="validate on the training images, too")
        free("--save-confusion", action="store_true", help="write confusion.csv: a row a class, a column a prediction")
    with parser.group("optimisation"):
        parser.identity("--momentum", default=0.9, type=number(float, 0), help="momentum of SGD")


def add_distributed(parser: Parser) -> None:
    """Processes and devices, under MoCo's names; see `launch.launch`."""
    free = parser.free
    seconds = {"type": number(float, high=LONGEST, above=0), "metavar": "SECONDS"}
    with parser.group("processes"):
        free("--multiprocessing-distributed", action="store_true", help="start a process per GPU of this node")
        free("--nproc-per-node", type=number(int, 1), help="processes to start so (unset: the GPUs, or 1 on a CPU)")
        free("--world-size", default=-1, type=number(int, -1), help="nodes; processes if they are started one by one")
        free("--rank", default=-1, type=number(int, -1), help="of this node; of this process if started by itself")
        free("--dist-url", metavar="URL", help="where they meet: tcp://HOST:PORT or env:// (unset: a free port here)")
        free("--dist-backend", choices=("nccl", "gloo"), help="unset: nccl on GPUs, gloo on a CPU")
        free("--gpu", type=number(int, 0), help="the one GPU to use")
        free("--dist-timeout", **seconds, help="for processes to meet in a collective (unset: torch's own)")
        seconds["type"] = number(float, 4, LONGEST)
        alive = "without a sign of life from a process until the others end"
        free("--peer-timeout", default=40.0, **seconds, help=alive)
