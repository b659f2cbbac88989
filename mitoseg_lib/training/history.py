"""What was measured while training."""

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Epoch:
    """What was measured in one epoch; `fit` says how.

    Attributes
    ----------
    epoch : int
        From 1.
    train_loss, validation_loss, train_iou, validation_iou : float
    """

    epoch: int
    train_loss: float
    validation_loss: float
    train_iou: float
    validation_iou: float


@dataclass
class History:
    """The epochs of a training, oldest first.

    Attributes
    ----------
    epochs : list of Epoch
    """

    epochs: list[Epoch] = field(default_factory=list)

    def as_rows(self) -> list[dict[str, float]]:
        """Return one dict an epoch: epoch, train_loss, validation_loss, train_iou, validation_iou."""
        return [asdict(epoch) for epoch in self.epochs]

    def column(self, name: str) -> list[float]:
        """Return one number of every epoch, for example ``history.column("validation_iou")`` for a curve."""
        return [getattr(epoch, name) for epoch in self.epochs]

    @property
    def best(self) -> Epoch:
        """The epoch with the highest validation IoU, the first of equals: the weights that are kept as the best."""
        return max(self.epochs, key=lambda epoch: epoch.validation_iou)
