"""What a training starts from: a model that knows mitochondria, or an encoder that knows photographs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mitoseg_lib.errors import FilePath
from mitoseg_lib.grey import GreyRange
from mitoseg_lib.models import LITE0, EncoderUNet, UNet, encoder_unet
from mitoseg_lib.prediction import ASSUMED_NM
from mitoseg_lib.tiff import VoxelSize
from mitoseg_lib.weights import WeightsError, load_weights, shipped_weights

__all__ = ["IMAGENET", "Start", "choose_start"]

IMAGENET = "imagenet"
FEWEST_NEIGHBOURS = 3  # slices of a stack in which one has two of them


@dataclass(frozen=True)
class Start:
    """A network to train, and what it knows already.

    Attributes
    ----------
    model : EncoderUNet or UNet
        Nothing in it is frozen.
    encoder : str or None
        As `mitoseg_lib.weights.save_weights` wants it.
    words : str
        What it is, for the user.
    threshold : float or None
        Of a trained model; None for one whose decoder is at random.
    voxel_size_nm, grey_range
        What it was trained with; see `mitoseg_lib.weights.WeightsMetadata`.
    """

    model: EncoderUNet | UNet
    encoder: str | None
    words: str
    threshold: float | None = None
    voxel_size_nm: VoxelSize = ASSUMED_NM
    grey_range: GreyRange | None = None

    @property
    def is_trained(self) -> bool:
        """Whether it finds mitochondria already."""
        return self.threshold is not None

    @property
    def n_slices(self) -> int:
        """Slices that it sees at a time: 3 with neighbours, else 1."""
        return getattr(self.model, "n_slices", 1)

    def set_neighbours(self, wanted: bool | None, *, depth: int) -> None:
        """Let the network see the slices above and below, too, or not; it has the same weights either way.

        Parameters
        ----------
        wanted
            None: a trained model stays as it is, and another sees them where there are three slices or more.
        depth
            Slices of the stack.

        Raises
        ------
        WeightsError
            If they are asked for, but the network has no encoder, whose colours they replace.
        """
        if not isinstance(self.model, EncoderUNet):
            if wanted:
                raise WeightsError(f"{self.words} takes single slices, but neighbours were asked for; leave them out.")
            return
        if wanted is None:
            wanted = self.n_slices > 1 if self.is_trained else depth >= FEWEST_NEIGHBOURS
        self.model.n_slices = 3 if wanted else 1


def choose_start(encoder: str | None = None, weights: FilePath | None = None, *, seed: int = 0) -> Start:
    """Return the network that a training starts from.

    Parameters
    ----------
    encoder
        Its name for `mitoseg_lib.models.encoder_unet`; by default that of the weights, else "efficientnet_lite0".
    weights
        A file that `mitoseg_lib.weights.save_weights` wrote; or "imagenet", for an encoder that knows photographs,
        under a decoder at random. None: the model that comes with the library, where it is there and the encoder is
        its own; else ImageNet.
    seed
        Of a decoder at random.

    Raises
    ------
    WeightsError
        If the file can't be used, or has another encoder.
    ValueError
        If the encoder is unknown.
    RuntimeError
        If ImageNet weights can't be had.
    """
    if weights is None and encoder in (None, LITE0):
        try:
            weights = shipped_weights()
        except WeightsError:  # a library without its model can train all the same
            weights = IMAGENET
    if weights is None or os.fspath(weights) == IMAGENET:
        name = encoder or LITE0
        torch.manual_seed(seed)
        model = encoder_unet(name, weights=IMAGENET, frozen=False)
        return Start(model, name, f"{name}'s ImageNet weights, under a decoder at random")
    model, metadata = load_weights(weights)
    file = Path(weights).name
    if encoder not in (None, metadata.encoder):
        raise WeightsError(
            f"{file} has the encoder {metadata.encoder!r}, but {encoder!r} was asked for; leave out --encoder, or give"
            " --weights imagenet."
        )
    name = metadata.encoder if isinstance(model, EncoderUNet) else None
    words = f"{file} ({metadata.encoder})"
    return Start(model, name, words, metadata.threshold, metadata.voxel_size_nm, metadata.grey_range)
