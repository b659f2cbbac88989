"""Draw the picture of the book's first page: ``python tools/landing.py``.

It shows the course's synthetic test stack, and what a network finds there that was trained as in chapter 6: a recorded
run (`mitoseg run lite0-imagenet-finetuned --data phantom --output results/phantom`), whose weights lie beside it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from mitoseg_lib.datasets import load_example
from mitoseg_lib.inference import predict_stack
from mitoseg_lib.recording import weights_path
from mitoseg_lib.runs import RESULTS
from mitoseg_lib.viewer import show_slices
from mitoseg_lib.weights import load_weights

PICTURE = Path(__file__).resolve().parents[1] / "_static" / "book" / "result.webp"
RUN, SLICE = "lite0-imagenet-finetuned", 30


def main() -> None:
    """Predict one slice, draw it without and with the mask, and write the picture."""
    model, metadata = load_weights(weights_path(RUN, 0, RESULTS / "phantom"))
    test = load_example("test")
    mask = predict_stack(model, test.image[SLICE : SLICE + 1])[0] >= metadata.threshold
    figure = show_slices(
        [test.image[SLICE]] * 2,
        labels=[None, mask],
        titles=["a synthetic slice", "what a network finds in it"],
        voxel_size_nm=test.voxel_size_nm,
    )
    figure.set_dpi(130)
    figure.canvas.draw()
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))
    drawn.convert("RGB").save(PICTURE, quality=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
