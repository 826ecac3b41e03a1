"""Measures of features: how many directions they use, and whether they fall towards collapse."""

import torch

from synco import distributed


@torch.no_grad()
def spread(q: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far a batch's embeddings are from collapse: q (N, C) unit rows → 0-dim tensors.

    "spread": the standard deviation in a dimension, on average, times √C: 0 where all rows are the same, 1 where they
    lie all over the sphere (SimSiam, arXiv 2011.10566, sec. 4.1). "effective_rank", from 1 to min(N, C): how many
    dimensions they fill, exp(-Σ p log p) with p = σ / Σσ + 1e-7 of the singular values σ (RankMe, arXiv 2210.02885).
    """
    sigma = torch.linalg.svdvals(q)  # (min(N, C),)
    p = sigma / sigma.sum() + 1e-7
    return {
        "spread": q.std(dim=0, correction=0).mean() * q.shape[1] ** 0.5,
        "effective_rank": torch.exp(-(p * p.log()).sum()),
    }


class Collapse:
    """Warns once when embeddings fall towards collapse, by their `spread` from the second epoch on.

    That is when they all but agree, or fall to a quarter of what they have had since. In the first steps they draw
    together in good runs, too.
    """

    def __init__(self) -> None:
        self.highest, self.told = {}, False

    def watch(self, epoch: int, numbers: dict[str, float]) -> None:
        """numbers: those of a print step; of a run without those of `spread` there is nothing to tell."""
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
