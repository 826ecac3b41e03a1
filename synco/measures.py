"""Measures of features, stored or of a step, and of how sure a number is.

Those of stored features are in float64 but the logistic regression on a GPU, which is in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from synco import distributed

STRENGTHS = tuple(10.0**power for power in range(2, -7, -1))  # of the L2 penalty, strongest first
CHUNK = 8192  # rows at a time, where their number could be large


# ---------------------------------------------------------------------------------------------------- of features


def effective_rank(rows: torch.Tensor) -> torch.Tensor:
    """exp(-sum p log p), p = s / sum(s) + 1e-7, s the singular values of rows (M, D): from 1 to min(M, D); 0-dim."""
    s = torch.linalg.svdvals(rows)
    p = s / s.sum() + 1e-7
    return torch.exp(-(p * p.log()).sum())


def rankme(rows: torch.Tensor) -> float:
    """RankMe (arXiv 2210.02885): how many directions the features (M, D) effectively use, from 1 to min(M, D).

    The `effective_rank` of the features as they are; the paper takes M = 25,600 or more. Raises ValueError if all
    features are 0.
    """
    if not rows.any():
        raise ValueError("all features are 0")
    return effective_rank(rows.double()).item()


def alignment(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean squared distance between two views of the same images (arXiv 2005.10242): unit rows (M, D) each; 0 to 4."""
    return (one.double() - other.double()).square().sum(dim=1).mean().item()


def uniformity(rows: torch.Tensor) -> float:
    """log of the mean of exp(-2 d²) over all pairs of different images (arXiv 2005.10242); d: distance of unit rows.

    0 where all rows (M, D) are the same, and about -4 at the lowest.
    NaN of a single row.
    """
    rows = rows.double()
    M, total = len(rows), 0.0
    if M < 2:
        return float("nan")
    for start in range(0, M, CHUNK // 8):
        similarity = rows[start : start + CHUNK // 8] @ rows.T  # d² = 2 - 2 <z_i, z_j>
        total += (4 * similarity - 4).exp_().sum().item()
    own = (4 * rows.square().sum(dim=1) - 4).exp().sum().item()  # each row with itself
    return float(np.log((total - own) / (M * (M - 1))))


def spread(rows: torch.Tensor) -> float:
    """Variance of unit rows (M, D), summed over the dimensions: 1 - |mean row|², from 0, all the same, to 1."""
    rows = rows.double()
    return (rows - rows.mean(dim=0)).square().sum(dim=1).mean().item()


def collapse_in_words(spread: float, rank: float, width: int) -> str:
    """One plain sentence on whether features have collapsed, from `spread` and `rankme` of features of that width."""
    if spread < 0.01:
        return "The features have collapsed: they are nearly the same for all images."
    if rank < max(2.0, 0.01 * width):
        return f"The features have collapsed to few directions: about {rank:.0f} of {width} are in use."
    return "The features have not collapsed."


# ------------------------------------------------------------------------------------------------ while it trains


@torch.no_grad()
def signs_of_collapse(q: torch.Tensor) -> dict[str, float]:
    """How far a batch's embeddings are from collapse: q (N, C) unit rows, on the host; NaN where they are not finite.

    "spread": the standard deviation in a dimension, on average, times √C: 0 where all rows are the same, 1 where they
    lie all over the sphere (SimSiam, arXiv 2011.10566, sec. 4.1); "effective_rank": see there.
    """
    spread = q.std(dim=0, correction=0).mean() * q.shape[1] ** 0.5
    rank = effective_rank(q) if spread.isfinite() else spread  # there are no singular values of NaN
    return {"spread": spread.item(), "effective_rank": rank.item()}


class Collapse:
    """Warns once when embeddings fall towards collapse, by their `signs_of_collapse` from the second epoch on.

    That is when they all but agree, or fall to a quarter of what they have had since. In the first steps they draw
    together in good runs, too.
    """

    def __init__(self) -> None:
        self.highest, self.told = {}, False

    def watch(self, epoch: int, numbers: dict[str, float]) -> None:
        """numbers: those of a print step; of a run without them there is nothing to tell."""
        for name, least in (("spread", 0.01), ("effective_rank", 0.0)):
            if name not in numbers or epoch == 0:
                return
            value = numbers[name]
            highest = self.highest[name] = max(value, self.highest.get(name, 0.0))
            if value < max(least, highest / 4) and not self.told:
                self.told = True
                distributed.warn(
                    f"the queries fall towards collapse: all images are getting nearly the same embedding, whose "
                    f"{name.replace('_', ' ')} is {value:.2g} after at most {highest:.2g}; a lower --lr may help"
                )


# ---------------------------------------------------------------------------------------------- how sure a number is


def bootstrap(values: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """The means of `draws` samples of n of the n values (n,), drawn with replacement → (draws,), sorted.

    The values are few different ones, such as 0 and 1: how often each is drawn is multinomial.
    """
    kinds, counts = np.unique(values, return_counts=True)
    drawn = generator.multinomial(len(values), counts / len(values), size=draws)
    return np.sort(drawn @ kinds / len(values))


def interval(values: np.ndarray, draws: int, generator: np.random.Generator) -> tuple[float, float]:
    """The 95 % interval of the mean of values (n,), by the percentiles of the `bootstrap`."""
    low, high = np.quantile(bootstrap(np.asarray(values, dtype=np.float64), draws, generator), [0.025, 0.975])
    return float(low), float(high)


def in_words(name: str) -> str:
    """The name of an accuracy in an evaluation's JSON ("knn k=10 t=0.1", "logistic 1 %") as a reader has it."""
    kind, _, rest = name.partition(" ")
    if kind == "knn":
        return f"kNN, {rest.replace(' ', ', ').replace('=', ' = ')}"
    return "logistic regression" + (f", {rest} of the labels" if rest != "100 %" else "")


# -------------------------------------------------------------------------------------------- logistic regression


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier. weight (C, D), bias (C,): of features less `mean` (D,), over `scale` (D,); classes (C,)."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    classes: torch.Tensor

    def predict(self, rows: torch.Tensor) -> torch.Tensor:
        """rows (M, D) → (M,) the most probable of the classes that it was trained on."""
        parts = [((part.to(self.mean) - self.mean) / self.scale) @ self.weight.T for part in rows.split(CHUNK)]
        return self.classes[(torch.cat(parts) + self.bias).argmax(dim=1)]


def logistic(
    rows: torch.Tensor,
    labels: torch.Tensor,
    strengths: Sequence[float],
    chosen: Callable[[Logistic], None] | None = None,
) -> Logistic:
    """Multinomial logistic regression on features (M, D) with labels (M,), by L-BFGS.

        mean cross-entropy + strength / 2 · |weight|²

    on features that are standardised to mean 0 and deviation 1; the bias is not penalised. Of several strengths each
    fit begins where the one before ended, and is given to `chosen`. Returns the last.
    """
    dtype = torch.float64 if rows.device.type == "cpu" else torch.float32
    classes, targets = labels.unique(return_inverse=True)
    mean, scale = _moments(rows, dtype)
    x = (rows.to(dtype) - mean).div_(scale)
    # along the features' principal axes, each weight in units in which the loss has the curvature 1 at weight 0:
    # L-BFGS is there in tens of steps, where along the features themselves it takes hundreds
    variances, axes = torch.linalg.eigh(sum(part.T.double() @ part.double() for part in x.split(CHUNK)) / len(x))
    axes = axes.to(dtype)
    for part in x.split(CHUNK):
        part.copy_(part @ axes)
    weight, bias = x.new_zeros(len(classes), x.shape[1]), x.new_zeros(len(classes))
    for strength in strengths:
        unit = (variances.clamp(min=0) / len(classes) + strength).rsqrt().to(dtype)  # (D,)
        weight, bias = _minimise(weight, bias, x.split(CHUNK), targets.split(CHUNK), strength, unit)
        fitted = Logistic(weight @ axes.T, bias, mean, scale, classes)
        if chosen:
            chosen(fitted)
    return fitted


def _moments(rows, dtype):
    """Mean and deviation of each column (D,); a column that is constant has the deviation 1."""
    mean = torch.stack([part.double().sum(dim=0) for part in rows.split(CHUNK)]).sum(dim=0) / len(rows)
    squares = torch.stack([(part.double() - mean).square().sum(dim=0) for part in rows.split(CHUNK)]).sum(dim=0)
    scale = (squares / len(rows)).sqrt()
    scale = torch.where(scale > 1e-6 * mean.abs() + 1e-12, scale, 1.0)
    return mean.to(dtype), scale.to(dtype)


def _minimise(weight, bias, x, y, strength, unit):
    """The weight (C, D) and bias (C,) of least loss on chunks x of features and y of labels; unit (D,): of a weight."""
    count = sum(map(len, y))
    parameters = torch.cat([weight / unit, bias[:, None]], dim=1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-8, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        total = 0.5 * strength * (parameters[:, :-1] * unit).square().sum()
        total.backward()
        total = total.detach()
        for rows, labels in zip(x, y):
            logits = torch.addmm(parameters[:, -1], rows, (parameters[:, :-1] * unit).T)
            part = F.cross_entropy(logits, labels, reduction="sum") / count
            part.backward()
            total = total + part.detach()
        return total

    optimizer.step(loss)
    return (parameters.detach()[:, :-1] * unit).contiguous(), parameters.detach()[:, -1].clone()


def choose_strength(
    rows: torch.Tensor, labels: torch.Tensor, held_out: torch.Tensor, strengths: Sequence[float] = STRENGTHS
) -> tuple[Logistic, float]:
    """`logistic` on all rows with the strength that is best on the held-out ones → (it, the strength).

    rows (M, D), labels (M,), held_out (M,): booleans, of which some but not all are true. Of equal ones the strongest.
    """
    hits = []
    asked, wanted = rows[held_out], labels[held_out]
    logistic(
        rows[~held_out], labels[~held_out], strengths, lambda fit: hits.append((fit.predict(asked) == wanted).sum())
    )
    best = int(torch.stack(hits).argmax())
    return logistic(rows, labels, [strengths[best]]), strengths[best]
