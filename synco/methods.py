"""Methods as counts of negatives: the published ones scaled to a queue, and what a run's counts make, in words."""

import argparse

from synco import options
from synco.negatives import CONTROL, KINDS, TYPES
from synco.options import number

FLAGS = ("n_hard", *(f"n{i}" for i in range(1, len(TYPES) + 1)), f"n_{CONTROL}")
PUBLISHED_K = 65536  # rows of the queue that the counts are for
COUNTS = {  # of FLAGS
    "synco": (1024, 256, 256, 256, 64, 64, 64, 0),
    "mochi": (1024, 128, 0, 1024, 0, 0, 0, 0),  # (N, s, s') = (1024, 1024, 128)
    "mocov2": (1024, 0, 0, 0, 0, 0, 0, 0),
    "mocov1": (1024, 0, 0, 0, 0, 0, 0, 0),
    "copied": (1024, 0, 0, 0, 0, 0, 0, None),  # as many as SynCo's
}


def preset(method: str, K: int) -> dict[str, int]:
    """{flag: n_hard and the counts of a method}: the published ones times K / 65,536, at least 1 where any are."""
    n_hard, *numbers = (max(1, round(n * K / PUBLISHED_K)) if n else n for n in COUNTS[method])
    if numbers[-1] is None:
        numbers[-1] = sum(list(preset("synco", K).values())[1:])
    return dict(zip(FLAGS, (n_hard, *numbers)))


def add_flags(parser: options.Parser, defaults: dict) -> None:
    """--method, and the counts and settings of the synthetic negatives, whose defaults are the model's."""
    identity = parser.identity
    with parser.group("synthetic negatives"):
        parser.free("--method", dest="preset", choices=COUNTS, help="its --n-hard and counts, times --moco-k / 65536; "
                    "flags that are given win")  # fmt: skip
        identity("--n-hard", default=defaults["n_hard"], type=number(int, 1), help="hardest queue rows to draw from")
        for i, name in enumerate(TYPES, 1):
            identity(f"--n{i}", default=defaults[f"n{i}"], type=number(int, 0), help=f"{name} negatives a query")
        identity("--n-copied", default=defaults["n_copied"], type=number(int, 0), help="hard negatives over again, "
                 "unchanged: a control, no part of SynCo")  # fmt: skip
        for name, kind, meaning in (
            ("alpha", number(float, high=1, above=0), "type 1: weight of the query ~ U(0, alpha)"),
            ("beta", number(float, above=1), "type 2: extrapolation ~ U(1, beta)"),
            ("gamma", number(float, high=1, above=0), "type 3: weight of a row ~ U(0, gamma)"),
            ("sigma", number(float, 0), "type 4: standard deviation of the noise"),
            ("delta", number(float, 0), "type 5: step along the similarity's gradient"),
            ("eta", number(float, 0), "type 6: step along the gradient's sign"),
        ):
            identity(f"--{name}", default=defaults[name], type=kind, help=meaning)
        start = "first epochs (or steps: 2500s) without synthesis; one number, or one for each type: 0,0.5,1,2,2,2"
        identity("--warmup-epochs", "--synth-start", default=defaults["warmup_epochs"], help=start,
                 type=options.lengths(len(TYPES)))  # fmt: skip
        identity("--cooldown-epochs", default=0, type=number(int, 0), help="last epochs without synthesis")


def counts(args: argparse.Namespace) -> tuple[int, ...]:
    """How many negatives of each of `KINDS` a query gets."""
    return tuple(getattr(args, flag) for flag in FLAGS[1:])


def warmups(args: argparse.Namespace) -> list:
    """The six types' warm-ups, in epochs or steps, see `options.length`."""
    return args.warmup_epochs if isinstance(args.warmup_epochs, list) else [args.warmup_epochs] * len(TYPES)


def describe(args: argparse.Namespace, steps: int, total: int) -> str:
    """The method in words. steps: of an epoch; total: of the run."""
    starts = warmups(args)
    starts = [*starts, min(starts, key=lambda start: options.in_epochs(start, steps))]  # the control's: the first
    active = {name: (count, start) for name, count, start in zip(KINDS, counts(args), starts) if count}
    if not active:
        return "MoCo (no synthetic negatives)"
    starts = {start for _, start in active.values()}
    each = ", ".join(f"{start} ({kind})" for kind, (_, start) in active.items())
    end = total / steps - args.cooldown_epochs
    when = f"from epoch {each if len(starts) > 1 else starts.pop()} on"
    when += f", before epoch {end:g}" if args.cooldown_epochs else ""
    if end <= min(options.in_epochs(start, steps) for _, start in active.values()):
        when = "in no epoch: all are warm-up or cool-down"
    where = f"the {args.n_hard} hardest of {args.moco_k} queue rows"
    copied, _ = active.pop(CONTROL, (0, 0))
    control = f"{copied} of them over again, unchanged: a control that is not part of SynCo" if copied else ""
    if not active:
        return f"MoCo with repeated hard negatives: for a query {where}, {control}, {when}"
    name = "MoCHi" if active.keys() <= {"interpolated", "mixed"} else "SynCo"
    kinds = ", ".join(f"{count} {kind}" for kind, (count, _) in active.items())
    made = sum(count for count, _ in active.values())
    control = f"; and {control}" if copied else ""
    return f"{name}: {made} synthetic negatives a query ({kinds}), made from {where}, {when}{control}"
