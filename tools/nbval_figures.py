"""Figures in chapters: compared by their decoded pixels, which nbval itself leaves out."""

import base64
import io

import numpy as np
from PIL import Image

# Another CPU may round a grey level or an anti-aliased edge differently; a changed figure differs by far more.
MEAN_TOLERANCE = 1.0  # grey levels, over all pixels and colours


def decode(png: str) -> np.ndarray:
    """Base64 PNG to int16 ``(y, x, 3)``, laid over white as a page shows it."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB")).astype(np.int16)


def figures_in(outputs) -> list[np.ndarray]:
    """Every PNG among a cell's outputs, in order."""
    return [decode(o["data"]["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def difference(new: list[np.ndarray], stored: list[np.ndarray]) -> str | None:
    """One sentence on the first figure that differs, or None."""
    if len(new) != len(stored):
        return f"the cell drew {len(new)} figures where {len(stored)} are stored"
    for number, (a, b) in enumerate(zip(new, stored, strict=True), start=1):
        if a.shape != b.shape:
            return f"figure {number} is {a.shape[1]} x {a.shape[0]} pixels, the stored one {b.shape[1]} x {b.shape[0]}"
        mean = float(np.abs(a - b).mean())
        if mean > MEAN_TOLERANCE:
            return f"figure {number} differs from the stored one by {mean:.2f} grey levels on average"
    return None


def comparing_figures(compare_text):
    """Wrap nbval's ``IPyNbCell.compare_outputs`` so that it compares figures too."""

    def compare(self, test, ref, skip_compare=None):
        if not compare_text(self, test, ref, skip_compare):
            return False
        problem = difference(figures_in(test), figures_in(ref))
        if problem:
            self.comparison_traceback.append(f"{problem}: run `make execute` and look at it")
        return problem is None

    compare.compares_figures = True
    return compare
