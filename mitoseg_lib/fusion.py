"""A trained U-Net written as fewer operations, for prediction: the same function of the image, sooner.

Two steps are linear and follow a convolution, or go before one, so that they can be part of its weights:

- A BatchNorm layer that doesn't learn any more multiplies each channel by a number and adds another.
- Repeating each pixel 2 x 2 times before a convolution of side 3 is a transposed convolution of side 4 and stride 2.
  Of the nine weights that meet a pixel of the larger image, at most four meet different pixels of the smaller one, so
  four products are left of nine.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mitoseg_lib.inference import evaluating
from mitoseg_lib.models import EncoderUNet

__all__ = ["fuse"]

LARGEST_DIFFERENCE = 1e-3  # of a logit, as a share of the largest; rounding explains some 1e-5
TRIAL_SIDE = 2  # of the image on which both are compared, in units of what the model's sides must be multiples of


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """Return a model for prediction that answers like this one, within rounding, with fewer operations.

    Normalisations become part of the convolutions before them, and the doubling of the sides part of the decoder's
    convolutions after it. The answer of the new model is compared with the model's own on a random image; if they
    differ, as they could for a network whose layers aren't applied in the order in which it names them, the model
    itself is returned.

    Parameters
    ----------
    model
        An `mitoseg_lib.models.EncoderUNet`, on any device, in float32; it isn't changed. Another network is returned
        as it is.

    Returns
    -------
    Module
        In ``eval()``, with the attributes of the model. It can't be trained on, and its weights have other names.
    """
    if not isinstance(model, EncoderUNet):
        return model
    fused = copy.deepcopy(model).eval()
    _fuse_normalisations(fused)
    _fuse_doublings(fused)
    fused.requires_grad_(False)
    return fused if _relative_difference(model, fused) <= LARGEST_DIFFERENCE else model


class _DoublingBlock(nn.Module):
    """A block of the decoder whose first convolution doubles the sides, too.

    The convolution sees the doubled features and the encoder's beside them; being linear, it is the sum of one for
    each.
    """

    def __init__(self, block: nn.Module, n_below: int) -> None:
        super().__init__()
        conv = block.conv1[0]
        below, beside = conv.weight[:, :n_below], conv.weight[:, n_below:]
        self.doubling = nn.ConvTranspose2d(n_below, conv.out_channels, 4, stride=2, padding=1)
        self.doubling.weight.data = _doubling_weight(below)
        self.doubling.bias.data = conv.bias
        self.beside: nn.Conv2d | None = None
        if beside.shape[1] > 0:
            self.beside = nn.Conv2d(beside.shape[1], conv.out_channels, 3, padding=1, bias=False)
            self.beside.weight.data = beside.contiguous()
        self.conv2 = block.conv2

    def forward(self, below: Tensor, height: int, width: int, skip_connection: Tensor | None = None) -> Tensor:
        """Return (n, channels, 2 y, 2 x); the arguments are those of the block that it stands for."""
        doubled = self.doubling(below)
        if self.beside is not None:
            doubled += self.beside(skip_connection)
        return self.conv2(torch.relu_(doubled))


def _doubling_weight(weight: Tensor) -> Tensor:
    """Weights (in, out, 4, 4) of a transposed convolution that doubles sides and convolves with (out, in, 3, 3)."""
    n_out, n_in = weight.shape[:2]
    turned = weight.flip(2, 3).transpose(0, 1).reshape(n_in * n_out, 1, 3, 3)
    return F.conv_transpose2d(turned, torch.ones_like(turned[:1, :, :2, :2])).reshape(n_in, n_out, 4, 4)


def _fuse_normalisations(module: nn.Module) -> None:
    """Make each BatchNorm part of the convolution named before it; an activation that is inside it stays."""
    before = None
    for name, part in list(module.named_children()):
        if isinstance(part, nn.BatchNorm2d) and before is not None:
            setattr(module, before, fuse_conv_bn_eval(getattr(module, before), part))
            setattr(module, name, getattr(part, "act", nn.Identity()))
        else:
            _fuse_normalisations(part)
        before = name if isinstance(part, nn.Conv2d) else None


def _fuse_doublings(model: EncoderUNet) -> None:
    """Replace the blocks of the decoder."""
    n_below = model.encoder.out_channels[-1]
    blocks = model.decoder.blocks
    for i, block in enumerate(blocks):
        n_out = block.conv1[0].out_channels
        blocks[i] = _DoublingBlock(block, n_below).to(model.mean.device)
        n_below = n_out


def _relative_difference(model: EncoderUNet, fused: nn.Module) -> float:
    """Largest difference of a logit, as a share of the largest logit, on noise that is the same each time."""
    side = TRIAL_SIDE * model.size_multiple
    noise = torch.rand(1, model.n_slices, side, side, generator=torch.Generator().manual_seed(0)).to(model.mean.device)
    with evaluating(model):
        expected = model(noise)
    return float((fused(noise) - expected).abs().max() / expected.abs().max())
