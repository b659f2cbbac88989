"""Random patches of a labelled stack, and their augmentation.

`PatchDataset` cuts patches out of a `Stack`, each from a random place: squares from its slices, or blocks for a 3D
network; `MiddleSlices` makes of blocks what a network with neighbouring slices takes. `train_augmentation` changes a
square patch and its mask in the ways in which tissue and microscopes vary; `turn_block` lays down a block in another
way.

The augmentations come from albumentations 2.0.8, which nothing outside this module knows.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from mitoseg_lib.stacks import Stack

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Augmentation = Callable[[Image, Mask, np.random.Generator], tuple[Image, Mask]]


class PatchDataset(Dataset[tuple[Tensor, Tensor]]):
    """Fresh random patches from all slices of a stack: a map-style torch dataset.

    Item i of epoch e is a pure function of (`seed`, e, i): the same with any number of workers, in any order,
    today and after a restart. Every epoch has other patches once `set_epoch` is called. A patch's slice and
    its place in the slice are drawn uniformly. Where a slice is smaller than the patch it is continued by
    reflection, again and again if need be.

    The image is float32 in [0, 1] (grey level / 255). Scaling to a mean and sd belongs to the model, since
    pretrained encoders differ in it. For spawned workers the whole stack is copied once to each of them.

    Parameters
    ----------
    stack : Stack
        With labels. For a part of the slices, pass ``stack.slices(split.train)``.
    patch_size : int or tuple of int
        Side of a square patch, or (y, x), in pixels; or (z, y, x), in voxels, for blocks.
    patches_per_epoch : int
        Length of the dataset.
    seed : int
        0 or more.
    augmentation : callable, optional
        Takes image (uint8, the patch's shape), mask (bool, same shape) and a NumPy ``Generator``, and returns
        both in the same shape and dtype; it must draw its random numbers from that generator.
        `train_augmentation` makes one for squares; `turn_block` is one for blocks.
    foreground_share : float
        Between 0 and 1. At least this share of the items of an epoch, ceil(share x patches_per_epoch) evenly
        spread over it, hold one or more foreground pixels, *after* augmentation: such a patch is placed at
        random around a foreground voxel drawn uniformly from the stack, and it stays as it was should the
        augmentation push all of its foreground out. The other items are placed anywhere, so they can hold
        foreground too.

    Raises
    ------
    ValueError
        When a size, the seed or the share is out of range.
    StackError
        When the stack has no labels, or labels of one class only.
    """

    def __init__(
        self,
        stack: "Stack",
        *,
        patch_size: int | tuple[int, ...],
        patches_per_epoch: int,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        foreground_share: float = 0.0,
    ) -> None:
        self.patch_size = _sides(patch_size)
        _check_at_least("patches_per_epoch", patches_per_epoch, 1)
        _check_at_least("seed", seed, 0)
        if not 0 <= foreground_share <= 1:
            raise ValueError(f"foreground_share is {foreground_share}, but it must lie in [0, 1]; use for example 0.5.")
        self.patches_per_epoch = patches_per_epoch
        self.seed = seed
        self.augmentation = augmentation
        self.foreground_share = foreground_share
        self._image = stack.image
        self._mask = stack.require_labels()
        # Foreground voxels in each row (z, y), summed up: enough to draw one of them uniformly, in little
        # memory.
        self._row_ends = self._mask.sum(axis=2, dtype=np.int64).ravel().cumsum() if foreground_share else None
        # Workers that live longer than an epoch see a change of it only in shared memory.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the patches of an epoch (0 or more), for this process and its workers.

        Call it before an epoch's loop starts: workers prepare items ahead of the loop.
        """
        _check_at_least("epoch", epoch, 0)
        self._epoch[0] = epoch

    def __len__(self) -> int:
        """Return the number of patches in an epoch."""
        return self.patches_per_epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return patch number `index` of the current epoch.

        Returns
        -------
        image : Tensor
            float32 in [0, 1], shape (1, y, x), or (1, z, y, x) for blocks.
        mask : Tensor
            float32, 0 or 1, same shape.
        """
        if not 0 <= index < self.patches_per_epoch:
            raise IndexError(
                f"Patch {index} was asked for, but an epoch has patches 0 to {self.patches_per_epoch - 1}."
            )
        rng = np.random.default_rng((self.seed, int(self._epoch[0]), int(index)))
        wants_foreground = self._must_hold_foreground(index)
        image, mask = self._crop(rng, wants_foreground)
        if self.augmentation is not None:
            new_image, new_mask = self._augmented(image, mask, rng)
            if new_mask.any() or not wants_foreground:
                image, mask = new_image, new_mask
        return _to_tensor(image).div_(255), _to_tensor(mask)

    def _must_hold_foreground(self, index: int) -> bool:
        """Spread the promised items evenly: of items 0 to i there are ceil((i + 1) x share) of them."""
        share = self.foreground_share
        return bool(np.ceil((index + 1) * share) > np.ceil(index * share))

    def _crop(self, rng: np.random.Generator, around_foreground: bool) -> tuple[Image, Mask]:
        """Return a random patch of image and mask."""
        voxel = self._foreground_voxel(rng) if around_foreground else (None, None, None)
        sides = (1, 1, *self.patch_size)[-3:]  # a square is a block of one slice
        starts = [_start(rng, n, p, at) for n, p, at in zip(self._image.shape, sides, voxel, strict=True)]
        z, y, x = (_indices(s, p, n) for s, p, n in zip(starts, sides, self._image.shape, strict=True))
        # Copies, so that no augmentation can change the stack.
        parts = [volume[z][:, y][:, :, x].copy() for volume in (self._image, self._mask)]
        return tuple(part.reshape(self.patch_size) for part in parts)

    def _foreground_voxel(self, rng: np.random.Generator) -> tuple[int, int, int]:
        """Return (z, y, x) of a foreground voxel, each equally likely."""
        chosen = rng.integers(self._row_ends[-1])
        row = int(np.searchsorted(self._row_ends, chosen, side="right"))
        z, y = divmod(row, self._mask.shape[1])
        columns = np.flatnonzero(self._mask[z, y])
        return z, y, int(columns[chosen - self._row_ends[row]])  # negative: counted from the end of the row

    def _augmented(self, image: Image, mask: Mask, rng: np.random.Generator) -> tuple[Image, Mask]:
        """Return the augmented pair, or raise when its shape would break a batch."""
        image, mask = self.augmentation(image, mask, rng)
        if image.shape != self.patch_size or mask.shape != self.patch_size:
            raise ValueError(
                f"The augmentation gave an image of shape {image.shape} and a mask of shape {mask.shape}, "
                f"but both must keep the patch's {self.patch_size}; correct the augmentation."
            )
        return image, mask


class MiddleSlices(Dataset[tuple[Tensor, Tensor]]):
    """Patches for a network that sees neighbouring slices: three slices as channels, and the middle one's mask.

    Parameters
    ----------
    blocks : PatchDataset
        Of blocks of three slices, ``patch_size=(3, y, x)``. The stack's first and last slice are never in the middle
        of a block that lies within it.

    Raises
    ------
    ValueError
        When the blocks are of another depth.
    """

    def __init__(self, blocks: PatchDataset) -> None:
        if len(blocks.patch_size) != 3 or blocks.patch_size[0] != 3:
            raise ValueError(
                f"The patches have sides {blocks.patch_size}, but blocks of three slices were expected; use for "
                "example patch_size=(3, 160, 160)."
            )
        self.blocks, self.set_epoch = blocks, blocks.set_epoch

    def __len__(self) -> int:
        """Return the number of patches in an epoch."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return patch number `index` of the current epoch: image (3, y, x) and mask (1, y, x), both float32."""
        image, mask = self.blocks[index]
        return image[0], mask[:, 1]


class TrainAugmentation:
    """A random change of an image and its mask; `train_augmentation` makes it."""

    def __init__(self, transforms: list[Any], *, square_only: bool) -> None:
        self._compose = _albumentations().Compose(transforms)
        self._square_only = square_only

    def __call__(self, image: Image, mask: Mask, rng: np.random.Generator | int) -> tuple[Image, Mask]:
        """Return new arrays; what was passed in stays as it is.

        Parameters
        ----------
        image : ndarray
            uint8, (y, x), or (z, y, x): all slices are changed in the same way.
        mask : ndarray
            bool, same shape.
        rng : Generator or int
            Source of all randomness, or a seed: the same state gives the same result.

        Returns
        -------
        image, mask : ndarray
            Same shapes and dtypes; the mask went where the image went.

        Raises
        ------
        ValueError
            When dtypes or shapes are others, or quarter turns meet a patch that isn't square.
        """
        _check_pair(image, mask)
        if self._square_only and image.shape[-2] != image.shape[-1]:
            raise ValueError(
                f"The patch has shape {image.shape}, but quarter turns need a square one; use a square "
                "patch_size or quarter_turns=False."
            )
        rng = np.random.default_rng(rng)
        # Not set_random_seed: it gives every transform the same seed, so that both flips would always come
        # together.
        self._compose.set_random_state(rng, Random(int(rng.integers(2**63))))
        # Slices are albumentations' channels. Copies, since it returns its very input where it draws "no change".
        image, mask = (part if part.ndim == 2 else np.moveaxis(part, 0, -1) for part in (image, mask))
        result = self._compose(image=image.copy(), mask=mask.astype(np.uint8))
        image, mask = result["image"], result["mask"].astype(bool)
        return tuple(
            np.ascontiguousarray(np.moveaxis(part, -1, 0) if part.ndim == 3 else part) for part in (image, mask)
        )


def train_augmentation(
    *,
    flips: bool = True,
    quarter_turns: bool = True,
    noise: float = 0.0,
    brightness_contrast: float = 0.0,
    scale: float = 0.0,
    blur: float = 0.0,
) -> TrainAugmentation:
    """Make the augmentation of training patches; each part can be switched off with False or 0.

    Flips and quarter turns move pixels without computing new ones, so they leave no artefacts. The order is:
    flips, quarter turns, scale, blur, brightness and contrast, noise, so that nothing smooths the noise.

    Parameters
    ----------
    flips : bool
        Flip along y, and along x, each with probability 1/2.
    quarter_turns : bool
        Turn by 0, 90, 180 or 270 degrees; patches must be square.
    noise : float
        Add Gaussian noise, of an sd drawn from 0 to `noise` grey levels (of 255) for each patch.
    brightness_contrast : float
        Multiply grey levels by a factor from 1 - b to 1 + b and add a number from -255 b to 255 b, for b
        between 0 and 1.
    scale : float
        Zoom around the centre by a factor from 1 / (1 + scale) to 1 + scale; the size stays. What a zoom out
        uncovers is filled by reflection. Grey levels are interpolated linearly, the mask takes the nearest
        pixel.
    blur : float
        Blur one patch in two with a Gaussian, of an sd drawn from 0 to `blur` pixels.

    Returns
    -------
    TrainAugmentation
        Called as ``image, mask = augmentation(image, mask, rng)``; it can be sent to worker processes.

    Raises
    ------
    ValueError
        When a strength is out of range.
    """
    _check_range("noise", noise, 255)
    _check_range("brightness_contrast", brightness_contrast, 1)
    _check_range("scale", scale, 10)
    _check_range("blur", blur, 10)
    a = _albumentations()
    transforms: list[Any] = []
    if flips:
        transforms += [a.VerticalFlip(p=0.5), a.HorizontalFlip(p=0.5)]
    if quarter_turns:
        transforms.append(a.RandomRotate90(p=1))
    if scale:
        transforms.append(_affine(scale=(1 / (1 + scale), 1 + scale)))
    if blur:
        transforms.append(a.GaussianBlur(blur_limit=0, sigma_limit=(0, blur), p=0.5))
    if brightness_contrast:
        transforms.append(a.RandomBrightnessContrast(brightness_contrast, brightness_contrast, p=1))
    if noise:
        transforms.append(a.GaussNoise(std_range=(0, noise / 255), p=1))
    return TrainAugmentation(transforms, square_only=quarter_turns)


def elastic_augmentation(*, displacement: float = 3.0, smoothness: float = 12.0) -> TrainAugmentation:
    """Make an augmentation that bends a patch and its mask as if the tissue were rubber.

    Each pixel is moved along y and along x by independent noise, smoothed with a Gaussian: P. Simard, D. Steinkraus,
    J. Platt: Best practices for convolutional neural networks, ICDAR 2003. What lies beyond the border is reflected.

    Parameters
    ----------
    displacement : float
        Its sd along each axis, in pixels, above 0.
    smoothness : float
        Sd of the Gaussian, in pixels, above 0: neighbours nearer than that move together.

    Returns
    -------
    TrainAugmentation

    Raises
    ------
    ValueError
        When a length is out of range.
    """
    import cv2

    for name, value in (("displacement", displacement), ("smoothness", smoothness)):
        if not 0 < value <= 100:
            raise ValueError(f"{name} is {value}, but it must lie in (0, 100]; use for example 3.")
    # albumentations smooths uniform noise between -1 and 1, of an sd of 3^-1/2; a Gaussian divides it by 2 pi^1/2 sd.
    alpha = displacement * math.sqrt(3) * 2 * math.sqrt(math.pi) * smoothness
    bend = _albumentations().ElasticTransform(
        alpha, smoothness, border_mode=cv2.BORDER_REFLECT_101, noise_distribution="uniform", p=1
    )
    return TrainAugmentation([bend], square_only=False)


def slice_drift(*, offset: float = 4.0, gain: float = 0.05) -> Augmentation:
    """Make an augmentation after which each slice has a brightness and a contrast of its own.

    A microscope's beam and detector drift from slice to slice. A network that sees neighbouring slices can come to
    rely on equal grey levels, where it was trained on a stack whose drift was taken out.

    Parameters
    ----------
    offset : float
        Sd of the number that is added to a slice, in grey levels (of 255), 0 or more.
    gain : float
        Sd of the factor about 1 with which a slice's distance from grey level 128 is multiplied, 0 or more.

    Returns
    -------
    callable
        Takes an image, uint8 (z, y, x) or (y, x), its mask, and a ``Generator``; the mask stays as it is.

    Raises
    ------
    ValueError
        When a strength is out of range.
    """
    _check_range("offset", offset, 255)
    _check_range("gain", gain, 1)
    return _SliceDrift(offset, gain)


@dataclass(frozen=True)
class _SliceDrift:
    """What `slice_drift` returns."""

    offset: float
    gain: float

    def __call__(self, image: Image, mask: Mask, rng: np.random.Generator) -> tuple[Image, Mask]:
        """Return a new image, and the mask."""
        _check_pair(image, mask)
        shape = (*image.shape[:-2], 1, 1)
        factor, added = rng.normal(1, self.gain, shape), rng.normal(0, self.offset, shape)
        drifted = (image.astype(np.float32) - 128) * factor + (128 + added)
        return drifted.round().clip(0, 255).astype(np.uint8), mask


def in_turn(*augmentations: Augmentation) -> Augmentation:
    """Return the augmentation that applies several, one after the other."""
    return _InTurn(augmentations)


@dataclass(frozen=True)
class _InTurn:
    """What `in_turn` returns; it can be sent to worker processes, as a function within a function can't."""

    augmentations: tuple[Augmentation, ...]

    def __call__(self, image: Image, mask: Mask, rng: np.random.Generator) -> tuple[Image, Mask]:
        """Return new arrays."""
        for augmentation in self.augmentations:
            image, mask = augmentation(image, mask, rng)
        return image, mask


def turn_block(image: Image, mask: Mask, rng: np.random.Generator) -> tuple[Image, Mask]:
    """Lay down a block and its mask in another way: flipped along any axis, and with axes of equal length swapped.

    Each way is equally likely: 48 for a cube, 16 for (32, 96, 96). For voxels of equal edges, since otherwise tissue
    looks different along each axis.

    Parameters
    ----------
    image : ndarray
        uint8, any number of axes.
    mask : ndarray
        bool, same shape.
    rng : Generator
        Source of all randomness.

    Returns
    -------
    image, mask : ndarray
        New arrays, same shapes and dtypes; the mask went where the image went.

    Raises
    ------
    ValueError
        When the shapes differ.
    """
    if image.shape != mask.shape:
        raise ValueError(
            f"The image has shape {image.shape} and the mask {mask.shape}, but they must be equal; pass one block."
        )
    axes = np.arange(image.ndim)
    for length in set(image.shape):
        equal = np.flatnonzero(np.array(image.shape) == length)
        axes[equal] = rng.permutation(equal)
    flipped = tuple(slice(None, None, step) for step in rng.choice((-1, 1), image.ndim))
    return tuple(part.transpose(axes)[flipped].copy() for part in (image, mask))


def rotate(image: Image, mask: Mask, degrees: float, *, border: str = "reflect") -> tuple[Image, Mask]:
    """Turn an image and its mask around the centre by any angle, to see what that does to the edges.

    The corners of the result lie outside the source. With a constant border they are black, which no tissue
    is, and a network learns the wedges; with a reflected border they are mirrored tissue. Angles other than
    quarter turns also blur the image, since pixels are interpolated.

    Parameters
    ----------
    image : ndarray
        uint8, (y, x).
    mask : ndarray
        bool, (y, x).
    degrees : float
        Counter-clockwise as the image is shown, with y pointing down.
    border : {"reflect", "constant"}
        Fill by reflection, or with 0 (and background in the mask).

    Returns
    -------
    image, mask : ndarray
        Same shapes and dtypes.

    Raises
    ------
    ValueError
        When dtypes or shapes are others, or the border is unknown.
    """
    _check_pair(image, mask)
    if border not in ("reflect", "constant"):
        raise ValueError(f"The border is {border!r}, but it must be 'reflect' or 'constant'; choose one of them.")
    turn = TrainAugmentation([_affine(rotate=(degrees, degrees), border=border)], square_only=False)
    return turn(image, mask, 0)


def _affine(*, scale: Any = 1.0, rotate: Any = 0.0, border: str = "reflect") -> Any:
    """Return albumentations' affine map, with no randomness but in `scale` and `rotate`."""
    import cv2

    mode = cv2.BORDER_REFLECT_101 if border == "reflect" else cv2.BORDER_CONSTANT
    return _albumentations().Affine(
        scale=scale,
        rotate=rotate,
        keep_ratio=True,
        balanced_scale=isinstance(scale, tuple),
        border_mode=mode,
        p=1,
    )


def _albumentations() -> Any:
    """Import albumentations late, since it takes seconds, and without its look-up of new versions."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations

    return albumentations


def _start(rng: np.random.Generator, size: int, patch: int, inside: int | None) -> int:
    """Draw where a patch begins on an axis, so that it contains the index `inside`, if given.

    Where the axis is shorter than the patch, the start is negative or 0, and the axis is continued later.
    """
    low, high = min(0, size - patch), max(0, size - patch)
    if inside is not None:
        low, high = max(low, inside - patch + 1), min(high, inside)
    return int(rng.integers(low, high + 1))


def _indices(start: int, patch: int, size: int) -> slice | NDArray[np.intp]:
    """Return `patch` indices from `start` on, reflected at both ends of an axis (no edge twice)."""
    if start >= 0 and start + patch <= size:
        return slice(start, start + patch)
    period = max(1, 2 * (size - 1))
    folded = np.arange(start, start + patch) % period
    return np.minimum(folded, period - folded) if size > 1 else np.zeros(patch, dtype=np.intp)


def _to_tensor(array: NDArray) -> Tensor:
    """Return a float32 tensor with an axis of one channel in front."""
    return torch.from_numpy(array.astype(np.float32, order="C")[None])


def _sides(patch_size: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return (y, x) or (z, y, x), or raise a ValueError."""
    sides = (patch_size, patch_size) if isinstance(patch_size, int | np.integer) else tuple(patch_size)
    if len(sides) not in (2, 3) or any(side < 1 for side in sides):
        raise ValueError(
            f"patch_size is {patch_size}, but it must be a side or (y, x), or (z, y, x) for blocks, of 1 or more; use "
            "for example 256."
        )
    return tuple(int(side) for side in sides)


def _check_at_least(name: str, value: int, lowest: int) -> None:
    """Raise a ValueError for a number that is too small."""
    if value < lowest:
        raise ValueError(f"{name} is {value}, but it must be {lowest} or more; correct it.")


def _check_range(name: str, value: float, highest: float) -> None:
    """Raise a ValueError for an augmentation's strength that is out of range."""
    if not 0 <= value <= highest:
        raise ValueError(f"{name} is {value}, but it must lie between 0 (off) and {highest}; correct it.")


def _check_pair(image: Image, mask: Mask) -> None:
    """Raise a ValueError unless these are a uint8 image and its bool mask."""
    if image.dtype != np.uint8 or mask.dtype != np.bool_ or image.ndim not in (2, 3) or image.shape != mask.shape:
        raise ValueError(
            f"The image is {image.dtype} {image.shape} and the mask {mask.dtype} {mask.shape}, but uint8 and bool of "
            "one shape, (y, x) or (z, y, x), were expected; augment before converting to float."
        )
