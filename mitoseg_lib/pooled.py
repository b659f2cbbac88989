"""Scores of a volume that arrives in parts.

A module of its own, because torchmetrics takes five seconds to import and nothing else here needs it.
"""

from dataclasses import fields

import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from mitoseg_lib.metrics import Scores, count_voxels

__all__ = ["PooledScores"]


class PooledScores(Metric):
    """Scores of a volume that arrives in parts, such as batches or slices (a torchmetrics ``Metric``).

    The counts are int64: float32 counts, as some metrics keep them, stop growing at 2^24 = 16.8 million
    voxels, and a stack of 165 x 768 x 1024 has 130 million. Under several processes ``compute`` sums over all
    of them.

    Examples
    --------
    >>> pooled = PooledScores()
    >>> pooled.update(torch.tensor([True, False]), torch.tensor([True, True]))
    >>> pooled.update(torch.tensor([True]), torch.tensor([True]))
    >>> pooled.scores().recall
    0.6666666666666666
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", default=torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: NDArray | Tensor, truth: NDArray | Tensor) -> None:
        """Add a part; arguments and errors as in `scores`."""
        counts = [torch.as_tensor(count, device=self.counts.device) for count in count_voxels(prediction, truth)]
        self.counts += torch.stack(counts)

    def compute(self) -> dict[str, float]:
        """Return the four counts and the five ratios of everything added so far, by name.

        A dict, because torchmetrics can't pass a frozen dataclass on; `scores` gives the dataclass.
        """
        counts = dict(zip((f.name for f in fields(Scores)), self.counts.tolist(), strict=True))
        return counts | Scores(**counts).as_dict()

    def scores(self) -> Scores:
        """Return the `Scores` of everything added so far."""
        values = self.compute()
        return Scores(*(values[f.name] for f in fields(Scores)))
