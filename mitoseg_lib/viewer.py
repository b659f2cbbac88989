"""Pictures of slices with scale bars, and a slice viewer that moves with a kernel and without one.

Colours are from Okabe and Ito's palette, which the colour-blind can tell apart; labels and predictions differ in the
line, too. Functions that draw with matplotlib return the figure and leave showing it to the caller.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import ipywidgets as widgets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Transform
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from mitoseg_lib.stacks import Stack

LABEL_COLOUR = "#E69F00"  # orange
PREDICTION_COLOUR = "#56B4E9"  # sky blue
CLASS_COLOURS = ("#009E73", "#E69F00", "#CC79A7")  # bluish green, orange, reddish purple
# Line and width; dashes want to be thicker for the eye to follow them.
OUTLINES = {"labels": (LABEL_COLOUR, "solid", 1.2), "predictions": (PREDICTION_COLOUR, (0, (3, 1)), 1.8)}
# Grey in black's place, which is left to the legend of line styles, and the palette without its yellow.
CURVE_COLOURS = ("#888888", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
CROSSHAIR_COLOUR = "#F0E442"  # yellow

MAXIMUM_SIDE = 420  # pixels; keeps the slider in view below the picture, and the page small
MAXIMUM_BYTES = 290_000  # of all pictures of a viewer; base64 makes a third more of it
WEBP_QUALITIES = (50, 40, 30, 25, 20, 10)  # the first one that keeps to MAXIMUM_BYTES is taken

FIGURE_DPI = 84  # a page shows 8 inches of it pixel by pixel; more would only make notebooks larger
FONT = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))  # Pillow's own lacks the µ

Voxel = tuple[float, float, float]


class SliceViewer(widgets.VBox):
    """A slider under a picture that moves through the slices of a stack.

    The pictures are stored with it, so that it works in a saved notebook and in the built book, where there is no
    Python. Therefore it shows a few slices, evenly spread, reduced to at most `MAXIMUM_SIDE` pixels a side and, all
    together, to about `MAXIMUM_BYTES`.

    Parameters
    ----------
    image : ndarray
        uint8, (z, y, x).
    labels, prediction : ndarray, optional
        bool, (z, y, x): drawn as outlines, labels in orange, the prediction in sky blue.
    voxel_size_nm : tuple of float, optional
        (z, y, x), for the scale bar and the depth; without it the caption says that the scale is unknown.
    n_slices : int
        How many slices to show at most; above some 30 the pictures get poor.

    Raises
    ------
    ValueError
        When the arrays aren't three-dimensional, differ in shape, have another dtype or no voxels, or the voxel size
        isn't three positive numbers.
    """

    def __init__(
        self,
        image: NDArray[np.uint8],
        labels: NDArray[np.bool_] | None = None,
        prediction: NDArray[np.bool_] | None = None,
        *,
        voxel_size_nm: Voxel | None = None,
        n_slices: int = 16,
    ) -> None:
        _check_volume(image, labels, prediction)
        _check_voxel_size(voxel_size_nm)
        if n_slices < 1:
            raise ValueError(f"n_slices is {n_slices}, but a viewer needs 1 or more; use for example 16.")
        self.slices = spread(len(image), n_slices)
        self._depth = len(image)
        volumes = {"labels": labels, "prediction": prediction}
        masks = {name: volume for name, volume in volumes.items() if volume is not None}
        pictures = [
            slice_picture(image[z], {name: mask[z] for name, mask in masks.items()}, voxel_size_nm=voxel_size_nm)
            for z in self.slices
        ]
        captions = [_caption(z, len(image), voxel_size_nm) for z in self.slices]
        pages = [_page(*pair, list(masks)) for pair in zip(_encode(pictures), captions, strict=True)]
        super().__init__(self._linked(pages))

    def _linked(self, pages: list[str]) -> list[widgets.Widget]:
        """Return picture and slider, linked in the browser where ipywidgets can do that."""
        slider = widgets.SelectionSlider(
            options=[(str(z), i) for i, z in enumerate(self.slices)],
            description="slice z",
            continuous_update=True,
            layout=widgets.Layout(width="100%", max_width=f"{MAXIMUM_SIDE}px"),
        )
        if hasattr(widgets, "Stack"):
            pictures = widgets.Stack([widgets.HTML(page) for page in pages], selected_index=0)
            widgets.jslink((slider, "index"), (pictures, "selected_index"))
        else:  # ipywidgets 7, as Colab has had it: Python turns the pages
            pictures = widgets.HTML(pages[0])
            slider.observe(lambda change: setattr(pictures, "value", pages[change["new"]]), "index")
        return [pictures, slider]

    def __repr__(self) -> str:
        """Return a line without memory addresses, since outputs are compared."""
        return f"SliceViewer({len(self.slices)} of {self._depth} slices)"


def spread(n: int, count: int) -> list[int]:
    """Return at most `count` indices of 0 .. n - 1, evenly spread, from the first to the last."""
    return sorted({round(float(i)) for i in np.linspace(0, n - 1, min(n, count))})


def scale_bar_nm(width_nm: float) -> float:
    """Return a round length (1, 2 or 5 times a power of ten, in nm) of at most a third of a picture's width."""
    power = 10.0 ** math.floor(math.log10(width_nm / 3))
    # 0.5 is there for a power that rounding made too large
    return max(step * power for step in (0.5, 1, 2, 5) if step * power <= width_nm / 3)


def format_length(nm: float) -> str:
    """Return a length in nm or µm, as ``"500 nm"`` or ``"2 µm"``."""
    return f"{nm / 1000:g} µm" if nm >= 1000 else f"{nm:g} nm"


def outline(mask: NDArray[np.bool_], width: int = 1) -> NDArray[np.bool_]:
    """Return the pixels of a mask (y, x) that lie within `width` pixels of its border, as bool (y, x).

    The edge of the picture is no border: where an object is cut off there, it stays open.
    """
    return mask & ~ndimage.binary_erosion(mask, iterations=width, border_value=1)


def slice_picture(
    image: NDArray[np.uint8], masks: dict[str, NDArray[np.bool_]], *, voxel_size_nm: Voxel | None = None
) -> Image.Image:
    """Draw one slice with outlines and a scale bar.

    Parameters
    ----------
    image : ndarray
        uint8, (y, x).
    masks : dict of ndarray
        ``"labels"`` and ``"prediction"``: bool, (y, x).
    voxel_size_nm : tuple of float, optional
        (z, y, x); without it there is no scale bar.

    Returns
    -------
    Image
        RGB, at most `MAXIMUM_SIDE` pixels wide and high, with square pixels.
    """
    size = _picture_size(image.shape, voxel_size_nm)
    picture = Image.fromarray(image).convert("RGB").resize(size, Image.Resampling.BOX)
    pixels = np.array(picture)
    colours = {"labels": LABEL_COLOUR, "prediction": PREDICTION_COLOUR}
    for name, mask in masks.items():
        reduced = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)).astype(bool)
        pixels[outline(reduced, 2 if name == "labels" else 1)] = _rgb(colours[name])
    picture = Image.fromarray(pixels)
    if voxel_size_nm is not None:
        _draw_scale_bar(picture, image.shape[1] * voxel_size_nm[2])
    return picture


def show_slices(
    images: Sequence[NDArray],
    *,
    titles: Sequence[str] | None = None,
    labels: Sequence[NDArray[np.bool_] | None] | None = None,
    predictions: Sequence[NDArray[np.bool_] | None] | None = None,
    voxel_size_nm: Voxel | None = None,
    columns: int | None = None,
) -> Figure:
    """Show slices side by side, with outlines and scale bars.

    Parameters
    ----------
    images : sequence of ndarray
        Each (y, x), or (y, x, 3) in colour: uint8 from 0 to 255, float from 0 to 1, or bool.
    titles : sequence of str, optional
        One for each image.
    labels, predictions : sequence, optional
        One mask, bool (y, x), or None for each image; outlined in orange and, dashed, in sky blue.
    voxel_size_nm : tuple of float, optional
        (z, y, x); without it the picture says that its scale is unknown.
    columns : int, optional
        Pictures in a row; all of them, but at most four, if it isn't given.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        When there is no image, one isn't two-dimensional or has another dtype, a list has another length, a mask
        another shape than its image, or the voxel size isn't three positive numbers.
    """
    n = len(images)
    lists = {"titles": titles, "labels": labels, "predictions": predictions}
    if n == 0:
        raise ValueError("There are 0 images, but one or more were expected; pass a list of slices.")
    for name, values in lists.items():
        if values is not None and len(values) != n:
            raise ValueError(f"There are {n} images and {len(values)} {name}, but one for each is needed; add None.")
    _check_voxel_size(voxel_size_nm)
    columns = max(1, min(n, columns or 4))
    rows = math.ceil(n / columns)
    height, width = _check_slice(images[0]).shape[:2]
    side = 8 / columns if columns > 1 else 4.5
    fig, axes = plt.subplots(
        rows, columns, figsize=(side * columns, (side * height / width + 0.3) * rows), squeeze=False, dpi=FIGURE_DPI
    )
    for number, ax in enumerate(axes.ravel()):
        ax.axis("off")
        if number < n:
            here = {name: values[number] if values is not None else None for name, values in lists.items()}
            _show_slice(ax, images[number], here, voxel_size_nm)
    fig.tight_layout(pad=0.4)
    if labels is not None and predictions is not None:
        lines = [
            Line2D([], [], color=colour, linestyle=line, linewidth=width) for colour, line, width in OUTLINES.values()
        ]
        _add_legend(fig, lines, list(OUTLINES))
    return fig


def show_classes(
    image: NDArray[np.uint8], classes: dict[str, NDArray[np.bool_]], *, voxel_size_nm: Voxel | None = None
) -> Figure:
    """Show one slice with up to three kinds of pixels laid over it in colours, with a legend and a scale bar.

    Parameters
    ----------
    image : ndarray
        uint8, (y, x).
    classes : dict of ndarray
        Name and mask, bool (y, x), of each kind: bluish green, orange, reddish purple, in this order.
    voxel_size_nm : tuple of float, optional
        (z, y, x); without it the picture says that its scale is unknown.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        When the image isn't a uint8 slice, there are more than three kinds, or a mask has another shape.
    """
    if len(classes) > len(CLASS_COLOURS):
        raise ValueError(
            f"There are {len(classes)} kinds of pixels, but only {len(CLASS_COLOURS)} colours; show fewer."
        )
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(
            f"The image is {image.dtype} of shape {image.shape}, but uint8 (y, x) was expected; pass a slice."
        )
    picture = np.repeat(image[..., None] / 255, 3, axis=2)
    for (name, mask), colour in zip(classes.items(), CLASS_COLOURS, strict=False):
        if mask.shape != image.shape:
            raise ValueError(
                f"The image has shape {image.shape} and the mask of {name!r} {mask.shape}, but they must be equal; "
                "pass the same slice of both."
            )
        picture[mask] = 0.4 * picture[mask] + 0.6 * np.array(_rgb(colour)) / 255
    fig = show_slices([picture], voxel_size_nm=voxel_size_nm)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in CLASS_COLOURS[: len(classes)]]
    _add_legend(fig, handles, list(classes))
    return fig


def show_views(stack: Stack, *, z: int, y: int, x: int) -> Figure:
    """Show the three cuts through a voxel: xy, xz (below) and yz (right), each with lines where the others cut it.

    All three have the same scale, so that one bar serves them all.

    Parameters
    ----------
    stack : Stack
        With a voxel size, which gives the cuts their true proportions.
    z, y, x : int
        The voxel.

    Returns
    -------
    Figure

    Raises
    ------
    StackError
        When the voxel size is unknown.
    ValueError
        When the voxel lies outside the stack.
    """
    size = stack.require_voxel_size()
    for axis, index, length in zip("zyx", (z, y, x), stack.shape, strict=True):
        if not 0 <= index < length:
            raise ValueError(f"{axis} is {index}, but the stack has {axis} from 0 to {length - 1}; choose one of them.")
    depth, height, width = (n * s for n, s in zip(stack.shape, size, strict=True))
    fig, axes = plt.subplots(
        2, 2, figsize=(7, 7 * (height + depth) / (width + depth) + 0.4), width_ratios=[width, depth],
        height_ratios=[height, depth], squeeze=False, dpi=FIGURE_DPI,
    )  # fmt: skip
    axes[1, 1].axis("off")
    labels = stack.labels if stack.labels is not None else np.zeros((1, 1, 1), bool)
    cuts = {
        f"xy, z = {z}": (axes[0, 0], lambda v: v[z], (x, y), size[1] / size[2], width / stack.shape[2]),
        f"xz, y = {y}": (axes[1, 0], lambda v: v[:, y], (x, z), size[0] / size[2], width / stack.shape[2]),
        f"yz, x = {x}": (axes[0, 1], lambda v: v[:, :, x].T, (z, y), size[1] / size[0], depth / stack.shape[0]),
    }
    for name, (ax, cut, (across, down), aspect, nm_a_pixel) in cuts.items():
        mask = cut(labels) if stack.labels is not None else None
        picture = cut(stack.image)
        _show_slice(ax, picture, {"titles": name, "labels": mask}, None, note=False)
        ax.set(aspect=aspect, xticks=[], yticks=[])
        line = {"color": CROSSHAIR_COLOUR, "linewidth": 1, "linestyle": (0, (5, 3))}
        ax.axhline(down, **line)
        ax.axvline(across, **line)
        if ax is axes[0, 0]:
            _add_scale_bar(ax, picture.shape, nm_a_pixel)
    fig.tight_layout(pad=0.4)
    return fig


def plot_history(
    histories: Mapping[str, Sequence[Mapping[str, float]]], *, what: Sequence[str] = ("iou", "loss"), columns: int = 2
) -> Figure:
    """Draw the curves of trainings: one panel for each quantity, one colour for each training.

    The training's own curve is dashed, that of the validation solid. Where a single curve belongs to each training
    (``what=["validation_iou"]``), it is solid.

    Parameters
    ----------
    histories : dict
        Name of each training, and the rows of its epochs: ``History.as_rows()`` or ``RecordedRun.history``.
    what : sequence of str
        "iou", "loss", or one column of the rows, such as "validation_iou". One panel each.
    columns : int
        Panels in a row.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        When there is nothing to draw, or more than seven trainings, for which there are no colours.
    """
    if not 1 <= len(histories) <= len(CURVE_COLOURS) or not what:
        raise ValueError(
            f"There are {len(histories)} trainings and {len(what)} quantities, but 1 to {len(CURVE_COLOURS)} trainings "
            "and 1 quantity or more were expected; draw them in several figures."
        )
    columns = min(columns, len(what))
    rows = math.ceil(len(what) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(8, 3.2 * rows), squeeze=False, dpi=FIGURE_DPI)
    for ax, quantity in zip(axes.ravel(), what, strict=False):
        for (name, epochs), colour in zip(histories.items(), CURVE_COLOURS, strict=False):
            _plot_curves(ax, name, epochs, quantity, colour)
        ax.set(xlabel="epoch", ylabel=quantity.replace("_", " ").replace("iou", "IoU"))
        if quantity.endswith("iou"):
            ax.set_ylim(-0.02, 1)
        ax.xaxis.get_major_locator().set_params(integer=True)  # there is no epoch 1.5
        ax.grid(alpha=0.3)
    for ax in axes.ravel()[len(what) :]:
        ax.axis("off")
    handles, names = axes[0, 0].get_legend_handles_labels()
    if any(quantity in ("iou", "loss") for quantity in what):
        handles += [Line2D([], [], color="black", linestyle=line) for line in ("-", "--")]
        names += ["validation", "training"]
    fig.tight_layout(pad=0.4, w_pad=2)  # else a label touches the panel on its left
    _add_legend(fig, handles, names)
    return fig


def _plot_curves(ax: Axes, name: str, epochs: Sequence[Mapping[str, float]], quantity: str, colour: str) -> None:
    """Draw one training's curves in one panel."""
    at = [row["epoch"] for row in epochs]
    pair = quantity in ("iou", "loss")
    ax.plot(at, [row[f"validation_{quantity}" if pair else quantity] for row in epochs], "-", color=colour, label=name)
    if pair:
        ax.plot(at, [row[f"train_{quantity}"] for row in epochs], "--", color=colour, linewidth=1)


def _show_slice(
    ax: Axes, image: NDArray, extras: dict[str, object], voxel_size_nm: Voxel | None, *, note: bool = True
) -> None:
    """Draw an image with its title, outlines and scale bar; grey levels mean the same in every picture."""
    ax.imshow(_check_slice(image), cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1)
    if extras.get("titles"):
        ax.set_title(extras["titles"], fontsize=9)
    for name, (colour, line, width) in OUTLINES.items():
        mask = extras.get(name)
        if mask is None:
            continue
        if mask.shape != image.shape[:2]:
            raise ValueError(
                f"The image has shape {image.shape} and its mask in {name} {mask.shape}, but they must be equal; "
                "pass the same slice of both."
            )
        if mask.any() and not mask.all():
            ax.contour(mask, [0.5], colors=colour, linewidths=width, linestyles=[line])
    if voxel_size_nm is not None:
        ax.set_aspect(voxel_size_nm[1] / voxel_size_nm[2])
        _add_scale_bar(ax, image.shape[:2], voxel_size_nm[2])
    elif note:
        _write(ax, "scale unknown", (0.03, 0.03), ax.transAxes)


def _add_scale_bar(ax: Axes, shape: tuple[int, int], nm_a_pixel: float) -> None:
    """Draw a white bar with a dark edge, and its length above it, at the lower left."""
    height, width = shape
    nm = scale_bar_nm(width * nm_a_pixel)
    thickness = 0.012 * max(shape)
    left, bottom = 0.04 * width, height - max(0.04 * height, thickness)
    bar = Rectangle(
        (left, bottom), nm / nm_a_pixel, -thickness, facecolor="white", edgecolor="black", linewidth=0.5
    )  # fmt: skip
    ax.add_patch(bar)
    _write(ax, format_length(nm), (left, bottom - thickness), ax.transData, points_above=3)


def _add_legend(fig: Figure, handles: list[Artist], names: list[str]) -> None:
    """Write a legend below the figure, which grows by it where it is saved with a tight box, as notebooks do."""
    fig.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=3, frameon=False)


def _write(ax: Axes, text: str, place: tuple[float, float], of: Transform, *, points_above: float = 0) -> None:
    """Write white text with a dark edge, legible on any tissue, at or above a place in the given coordinates."""
    edge = [withStroke(linewidth=2, foreground="black")]
    ax.annotate(
        text, place, (0, points_above), xycoords=of, textcoords="offset points",
        color="white", fontsize=8, path_effects=edge, annotation_clip=False,
    )  # fmt: skip


def _check_volume(image: NDArray, labels: NDArray | None, prediction: NDArray | None) -> None:
    """Raise a ValueError unless these are a uint8 volume and its bool masks."""
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"The image is a {type(image).__name__}, but an array was expected; pass for example stack.image."
        )
    if image.ndim != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(
            f"The image is {image.dtype} of shape {image.shape}, but uint8 (z, y, x) with at least one voxel was "
            "expected; load it with load_stack."
        )
    for name, mask in (("labels", labels), ("prediction", prediction)):
        if mask is not None and (mask.shape != image.shape or mask.dtype != np.bool_):
            raise ValueError(
                f"The {name} are {mask.dtype} of shape {mask.shape}, but bool of the image's shape {image.shape} were "
                "expected; compare with a threshold, or pass the same slices."
            )


def _check_slice(image: NDArray) -> NDArray:
    """Return an image (y, x) or (y, x, 3) that can be drawn, or raise a ValueError."""
    drawable = image.dtype in (np.uint8, np.bool_) or np.issubdtype(image.dtype, np.floating)
    flat = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    if not flat or image.size == 0 or not drawable:
        raise ValueError(
            f"An image is {image.dtype} of shape {image.shape}, but uint8, float or bool (y, x) or (y, x, 3) was "
            "expected; pass one slice, for example stack.image[0]."
        )
    return image


def _check_voxel_size(voxel_size_nm: Voxel | None) -> None:
    """Raise a ValueError unless this is None or three positive numbers."""
    if voxel_size_nm is None:
        return
    if len(voxel_size_nm) != 3 or not all(math.isfinite(nm) and nm > 0 for nm in voxel_size_nm):
        raise ValueError(
            f"voxel_size_nm is {voxel_size_nm}, but three positive numbers (z, y, x) were expected; "
            "pass for example (5, 5, 5), or None where it is unknown."
        )


def _picture_size(shape: tuple[int, int], voxel_size_nm: Voxel | None) -> tuple[int, int]:
    """Return (width, height) in square pixels, reduced to `MAXIMUM_SIDE`."""
    height, width = shape
    if voxel_size_nm is not None:
        height = height * voxel_size_nm[1] / voxel_size_nm[2]
    factor = min(1, MAXIMUM_SIDE / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _draw_scale_bar(picture: Image.Image, width_nm: float) -> None:
    """Draw a white bar on a dark ground, with its length, into the lower left corner."""
    nm = scale_bar_nm(width_nm)
    length = round(nm / width_nm * picture.width)
    draw = ImageDraw.Draw(picture)
    left, bottom = 8, picture.height - 8
    draw.rectangle((left - 2, bottom - 6, left + length + 1, bottom + 1), fill="black")
    draw.rectangle((left, bottom - 4, left + length - 1, bottom - 1), fill="white")
    text = {"fill": "white", "font": ImageFont.truetype(FONT, 13), "stroke_width": 2, "stroke_fill": "black"}
    draw.text((left, bottom - 24), format_length(nm), **text)


def _rgb(colour: str) -> tuple[int, ...]:
    """Return (red, green, blue) of a colour written as ``#rrggbb``."""
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _caption(z: int, depth: int, voxel_size_nm: Voxel | None) -> str:
    """Return the words that stand under a picture and begin its alt text."""
    deep = f"{format_length(z * voxel_size_nm[0])} deep" if voxel_size_nm is not None else "scale unknown"
    return f"slice {z} of 0 to {depth - 1}, {deep}"


def _encode(pictures: list[Image.Image]) -> list[bytes]:
    """Return pictures as WebP, in the best quality that keeps all of them together to `MAXIMUM_BYTES`."""
    for quality in WEBP_QUALITIES:
        encoded = []
        for picture in pictures:
            buffer = io.BytesIO()
            picture.save(buffer, format="webp", quality=quality)
            encoded.append(buffer.getvalue())
        if sum(map(len, encoded)) <= MAXIMUM_BYTES:
            break
    return encoded


def _page(webp: bytes, caption: str, names: list[str]) -> str:
    """Return the HTML of one slice: picture, caption, legend."""
    data = base64.b64encode(webp).decode()
    alt = caption + (f"; {' and '.join(names)} outlined" if names else "")
    colours = {"labels": LABEL_COLOUR, "prediction": PREDICTION_COLOUR}
    legend = "".join(
        f'<span style="border-bottom:3px solid {colours[name]};margin-left:1em">{name}</span>' for name in names
    )
    return (
        f'<img alt="{alt}" src="data:image/webp;base64,{data}" style="max-width:100%;display:block">'
        f'<div style="line-height:1.6">{caption}{legend}</div>'
    )
