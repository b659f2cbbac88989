"""What a TIFF's description says of the whole volume: how many slices it has, and how large its voxels are.

Three dialects are read: ImageJ's lines, tifffile's JSON and OME-XML. Nothing is guessed: a unit that is not
in `UNITS`, or two statements that contradict each other, give no voxel size.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from xml.etree import ElementTree

from mitoseg_lib.errors import StackError, damaged

UNITS = {  # nm in one unit, in the spellings of ImageJ, OME-XML and people; "\xb5" and "\u03bc" are two different mu
    **dict.fromkeys(("nm", "nanometer", "nanometre", "nanometers", "nanometres"), 1.0),
    **dict.fromkeys(("um", "\xb5m", "\u03bcm", "\\u00b5m", "micron", "microns"), 1e3),
    **dict.fromkeys(("micrometer", "micrometre", "micrometers", "micrometres"), 1e3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e6),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e7),
    **dict.fromkeys(("inch", "inches", "in"), 2.54e7),
    **dict.fromkeys(("\xe5", "\u212b", "angstrom"), 0.1),
    **dict.fromkeys(("m", "meter", "metre"), 1e9),
}
RESOLUTION_UNITS = {2: "inch", 3: "cm"}  # TIFF 6.0, tag ResolutionUnit; 1 means none

MOST_IMAGEJ_CHANNELS = 7

VoxelSize = tuple[float, float, float]


@dataclass(frozen=True)
class Description:
    """What a file declares; None where it says nothing."""

    slices: int | None = None
    plane: tuple[int, int] | None = None
    spacing: float | None = None
    unit: str | None = None
    voxel_size_nm: VoxelSize | None = None


def read_description(text: str, samples: int = 1) -> Description:
    """Parse the ImageDescription of a file's first page.

    Parameters
    ----------
    text
        The description.
    samples
        Samples a pixel: 1 for grey, 3 for RGB, 4 for RGBA. Some dialects count them as an axis or as channels.

    Raises
    ------
    StackError
        If the description is of a known kind but damaged, or declares something else than one volume.
    """
    text = text.strip("\0 \r\n\t")
    if text.startswith("ImageJ="):
        return _imagej(text)
    if text.startswith('{"shape"'):
        return _shaped(text, samples)
    if "<OME" in text[:2000] or text.endswith("OME>"):
        return _ome(text, samples)
    return Description()


def voxel_size(description: Description, per_unit: tuple[float, float], resolution_unit: int) -> VoxelSize | None:
    """Voxel size in nm, (z, y, x), or None where the file doesn't say it completely.

    Parameters
    ----------
    description
        What the description declares; OME-XML states the whole size itself.
    per_unit
        Pixels per unit, (y, x), from the resolution tags.
    resolution_unit
        Tag ResolutionUnit. ImageJ writes 1 (none) and names the unit in the description instead. A unit here
        that contradicts the description's gives None.
    """
    if description.voxel_size_nm:
        return description.voxel_size_nm
    unit = (description.unit or "").strip().lower()
    tag_unit = RESOLUTION_UNITS.get(resolution_unit)
    contradicts = tag_unit and UNITS.get(unit) != UNITS[tag_unit]
    if not description.spacing or unit not in UNITS or contradicts or min(per_unit) <= 0:
        return None
    size = tuple(UNITS[unit] * length for length in (description.spacing, 1 / per_unit[0], 1 / per_unit[1]))
    return size if all(math.isfinite(length) and length > 0 for length in size) else None


def _imagej(text: str) -> Description:
    """ImageJ: lines of key=value; slices may be called frames, as after importing a series of pictures."""
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    slices, frames, channels = (_count(values.get(key, "1")) for key in ("slices", "frames", "channels"))
    images = _count(values.get("images", str(slices * frames * channels)))
    if channels > MOST_IMAGEJ_CHANNELS:  # slices whose axis the program that wrote them didn't name
        slices, channels = slices * channels, 1
    _require_one_volume([channels], [slices, frames])
    if {"slices", "frames", "channels"} & values.keys() and images != slices * frames * channels:
        raise damaged(f"it declares {images} images and {slices * frames * channels} slices")
    return Description(images if images > 1 else None, None, _number(values.get("spacing")), values.get("unit"))


def _shaped(text: str, samples: int) -> Description:
    """tifffile: JSON with the array's shape."""
    try:
        values = json.loads(text)
        shape = [_count(str(length)) for length in values["shape"]]
        axes = str(values.get("axes", ""))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise damaged("its description can't be read") from None
    if samples > 1:
        shape, axes = _without_samples(shape, axes, samples)
    channels = [length for axis, length in zip(axes, shape, strict=False) if axis in "CS"]
    _require_one_volume(channels, shape[:-2])
    plane = (shape[-2], shape[-1]) if len(shape) > 1 else None
    slices = math.prod(shape[:-2]) if len(shape) > 2 else None
    unit = values.get("unit")
    spacing = _number(str(values.get("spacing")))
    return Description(slices, plane, spacing, unit if isinstance(unit, str) else None)


def _without_samples(shape: list[int], axes: str, samples: int) -> tuple[list[int], str]:
    """Shape and axes without those of the colours: the last, or the third last if each colour has a plane."""
    place = len(shape) - (1 if shape[-1:] == [samples] else 3)
    if place < 0 or shape[place] != samples:
        raise damaged(f"it has {samples} samples a pixel and its own description says {shape}")
    return shape[:place] + shape[place + 1 :], axes[:place] + axes[place + 1 :]


def _ome(text: str, samples: int) -> Description:
    """OME-XML: one image whose planes are this file's pages in order (OME-TIFF specification 6)."""
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError):
        raise damaged("its OME-XML description can't be read") from None
    pixels = [element for element in root.iter() if element.tag.endswith("}Pixels") or element.tag == "Pixels"]
    if len(pixels) != 1:
        raise StackError(f"holds {len(pixels)} OME images, but one stack was expected; save the stack alone")
    values = pixels[0].attrib
    sizes = {axis: _count(values.get(f"Size{axis}", "")) for axis in "CZTYX"}
    is_one_colour_image = sizes["C"] == samples
    _require_one_volume([1 if is_one_colour_image else sizes["C"]], [sizes["Z"], sizes["T"]])
    slices = sizes["Z"] * sizes["T"]
    _require_planes_in_order(pixels[0], slices)
    lengths = [
        (
            _number(values.get(f"PhysicalSize{axis}")),
            values.get(f"PhysicalSize{axis}Unit", "\xb5m").strip().lower(),
        )
        for axis in "ZYX"
    ]
    known = all(length and unit in UNITS for length, unit in lengths)
    size = tuple(length * UNITS[unit] for length, unit in lengths) if known else None
    return Description(slices if slices > 1 else None, (sizes["Y"], sizes["X"]), voxel_size_nm=size)


def _require_planes_in_order(pixels: ElementTree.Element, slices: int) -> None:
    """Raise StackError unless page i of this file is slice i of the volume."""
    for block in (element for element in pixels if element.tag.endswith("TiffData")):
        first = max(_index(block, "FirstZ"), _index(block, "FirstT"))
        planes = _count(block.get("PlaneCount", "1" if "IFD" in block.attrib else str(slices)))
        if _index(block, "IFD") != first or first + planes > slices:
            raise StackError(
                "has pages in another order, or fewer, than its OME-XML description says, but page i was expected to be"
                " slice i; save the stack again, for example in Fiji"
            )
    files = {element.get("FileName") for element in pixels.iter() if element.tag.endswith("UUID")}
    if len(files) > 1:
        raise StackError("is one of several files of an OME stack, but one file was expected; save it as one file")


def _require_one_volume(channels: list[int], leading: list[int]) -> None:
    """Raise StackError unless there is one channel and at most one axis besides y and x."""
    if any(count > 1 for count in channels):
        raise StackError(
            f"has {max(channels)} channels, but one grey channel was expected; save the one wanted, or, if they"
            " are slices, save them with the axes ZYX"
        )
    long = [length for length in leading if length > 1]
    if len(long) > 1:
        raise StackError(
            f"is 4D ({' x '.join(map(str, long))} planes), but a 3D stack (z, y, x) was expected; save one volume"
        )


def _count(text: str) -> int:
    """A positive whole number; StackError otherwise."""
    if not re.fullmatch(r"[0-9]{1,12}", text.strip(), re.ASCII) or int(text) < 1:
        raise damaged(f"it declares the size {text[:20]!r}")
    return int(text)


def _index(element: ElementTree.Element, key: str) -> int:
    text = element.get(key, "0")
    return int(text) if re.fullmatch(r"[0-9]{1,12}", text, re.ASCII) else -1


def _number(text: str | None) -> float | None:
    """A positive finite number, or None."""
    try:
        value = abs(float(text))  # ImageJ writes a negative spacing for a stack taken from the bottom up
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None
