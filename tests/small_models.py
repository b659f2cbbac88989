"""Small networks for tests of what is around them: one whose answer can be computed by hand, one at random."""

import torch
from torch import nn

from mitoseg_lib.models import UNet

SLOPE = 40


def grey_unet(level=128):
    """A real U-Net, set by hand, with the logits 40 x (grey - level / 255): foreground is what is brighter."""
    model = UNet(2, width=1, depth=1, normalisation="none")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for block in (model.first, model.up[0]):
            for conv in (block.layers[0], block.layers[3]):
                conv.weight[0, 0, 1, 1] = 1  # hands its first channel on
        model.head.weight[:] = SLOPE
        model.head.bias[:] = -SLOPE * level / 255
    return model.eval()


def random_unet(seed=0, **options):
    """A U-Net at random whose probabilities differ from place to place."""
    torch.manual_seed(seed)
    model = UNet(2, **({"width": 8, "depth": 2} | options))
    nn.init.normal_(model.head.weight, std=3)
    for _ in range(30):  # so that BatchNorm's running statistics have become those of its layers
        model(torch.rand(2, 1, 16, 16))
    return model.eval()
