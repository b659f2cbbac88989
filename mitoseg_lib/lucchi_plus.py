"""The re-annotated labels of the EPFL stacks (Lucchi++), read from the zip that they come in.

Casser et al., Fast mitochondria detection for connectomics (MIDL 2020), drew the labels of both stacks again. The file
itself couldn't be fetched when this was written. How it is built was taken from the code of others that reads it
(torch-em, micro-sam and empanada, which know it by the same sha256): a folder for all, in it Train_In, Train_Out,
Test_In and Test_Out, with 165 PNGs each; images called mask0000.png to mask0164.png, labels 0.png to 164.png, white on
black, and perhaps in colour with an alpha channel. So the reader asks for little more than that, and checks the rest.

Nothing is unpacked to the disk, so that names in the zip can't lead anywhere.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from mitoseg_lib.errors import StackError, named_errors

__all__ = ["FOLDERS", "read_labels", "require_same_tissue"]

FOLDERS = {"training": ("Train_In", "Train_Out"), "testing": ("Test_In", "Test_Out")}  # images, labels
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # of Pillow, with 8 bits a channel or fewer
LEAST_LIKE = 0.5  # correlation of two pictures of one slice; that of different tissue is near 0


def read_labels(path: Path, part: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the labels of a stack.

    Parameters
    ----------
    path
        The zip.
    part
        ``"training"`` or ``"testing"``.
    shape
        What they must have, (z, y, x).

    Returns
    -------
    numpy.ndarray
        bool (z, y, x). In colour images foreground is what is white and opaque, as it is for torch-em; grey ones must
        have two values, of which 0 is background.

    Raises
    ------
    StackError
        If the zip is damaged, or lacks slices, or they have another size or other values than two.
    """
    folder, values = FOLDERS[part][1], np.empty(shape, np.uint8)
    for target, picture in zip(values, _pictures(path, folder, range(shape[0]), shape), strict=True):
        if picture.mode in ("1", "L"):
            target[...] = picture.convert("L")
        else:
            target[...] = np.where((np.asarray(picture.convert("RGBA")) == 255).all(axis=2), 255, 0)
    found = sorted({int(value) for one in values for value in np.unique(one)})
    if len(found) != 2 or found[0] != 0:
        listed = ", ".join(map(str, found[:6])) + (", ..." if len(found) > 6 else "")
        with named_errors(path):
            raise StackError(f"has the values {listed} in {folder}, but 0 and 255 were expected; download it again")
    return values > 0


def require_same_tissue(path: Path, part: str, image: np.ndarray) -> None:
    """Raise StackError unless the images that the labels were drawn over are those of a stack, slice by slice.

    Grey levels may differ, as they do in a rebuilt copy of the stack. So each of five slices must be more like the one
    of its number than like its neighbours, by their correlation (in EPFL's stacks that of neighbours is below 0.91).

    Parameters
    ----------
    path
        The zip.
    part
        ``"training"`` or ``"testing"``.
    image
        The stack, uint8 (z, y, x).
    """
    folder = FOLDERS[part][0]
    checked = [round(len(image) * share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    for number, picture in zip(checked, _pictures(path, folder, checked, image.shape), strict=True):
        drawn_over = np.asarray(picture.convert("L"))
        neighbours = [z for z in (number - 1, number + 1) if 0 <= z < len(image)]
        of_others = max((_correlation(drawn_over, image[z]) for z in neighbours), default=-1.0)
        if _correlation(drawn_over, image[number]) < max(of_others, LEAST_LIKE):
            with named_errors(path):
                raise StackError(
                    f"shows other tissue in slice {number} of {folder} than {part}.tif, but its labels are of the same"
                    " slices in EPFL's stacks; get the official ones"
                )


def _pictures(path: Path, folder: str, slices: Sequence[int], shape: tuple[int, int, int]) -> Iterator[Image.Image]:
    """Slices of a folder in the zip, decoded and of the right size; StackError where they aren't as expected."""
    with _reading(path):
        archive = zipfile.ZipFile(path)
    with archive:
        with _reading(path):
            members = _members(archive, folder, shape[0])
        for number in slices:
            with _reading(path):
                picture = _decoded(archive.read(members[number]), members[number].filename, shape[1:])
            yield picture


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with the zip, or a PNG in it, into a StackError that begins with the zip's name."""
    with named_errors(path):
        try:
            yield
        except (StackError, FileNotFoundError, PermissionError, MemoryError):
            raise
        except Exception as error:  # they raise many kinds
            reason = " ".join(str(error).split())[:200]
            raise StackError(
                f"is damaged or cut off ({reason}), but a zip of PNG slices was expected; download it again"
            ) from error


def _decoded(data: bytes, name: str, shape: tuple[int, int]) -> Image.Image:
    """Picture of a PNG; its size is looked at before it is decoded."""
    picture = Image.open(io.BytesIO(data), formats=["PNG"])
    if picture.size != shape[::-1]:
        raise StackError(
            f"has {picture.size[1]} x {picture.size[0]} pixels in {name}, but {shape[0]} x {shape[1]} were expected;"
            " download it again"
        )
    if picture.mode not in MODES:
        raise StackError(f"has more than 8 bits a pixel in {name}, but 8 were expected; download it again")
    picture.load()
    return picture


def _members(archive: zipfile.ZipFile, folder: str, expected: int) -> list[zipfile.ZipInfo]:
    """The PNGs of a folder, wherever it lies in the zip, in the order of the numbers in their names."""
    found: dict[int, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        place = PurePosixPath(member.filename)
        is_hidden = "__MACOSX" in place.parts or place.name.startswith(".")  # what a Mac adds to each zip
        if is_hidden or place.suffix.lower() != ".png" or place.parent.name.casefold() != folder.casefold():
            continue
        digits = re.findall("[0-9]+", place.stem)
        if not digits or int(digits[-1]) in found:
            other = f" and {found[int(digits[-1])].filename}" if digits else ""
            raise StackError(
                f"has {member.filename}{other}, but one numbered PNG a slice was expected; unzip it to look"
            )
        found[int(digits[-1])] = member
    numbers = sorted(found)
    if len(numbers) != expected or numbers[-1] - numbers[0] != expected - 1:
        which = f", numbered {numbers[0]} to {numbers[-1]}" if numbers else ""
        raise StackError(
            f"has {len(numbers)} PNGs{which}, in {folder}, but {expected} with numbers in a row were expected; download"
            " it again"
        )
    return [found[number] for number in numbers]


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of the grey levels of two slices; 0 where one has none."""
    first, second = (part - part.mean() for part in (first.astype(np.float64), second.astype(np.float64)))
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale else 0.0
