import base64
import io

import numpy as np
from PIL import Image

import nbval_figures


def output(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return {"output_type": "display_data", "data": {"image/png": base64.b64encode(buffer.getvalue()).decode()}}


def difference(new, stored):
    return nbval_figures.difference(nbval_figures.figures_in(new), nbval_figures.figures_in(stored))


PICTURE = np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 100, 3))


def test_equal_and_nearly_equal_figures_pass():
    nearly = PICTURE.copy()
    nearly[::2] += 1
    assert difference([output(PICTURE)], [output(PICTURE)]) is None
    assert difference([output(nearly)], [output(PICTURE)]) is None


def test_a_changed_figure_is_found():
    moved = np.roll(PICTURE, 20, axis=0)
    assert "figure 2 differs" in difference([output(PICTURE), output(moved)], [output(PICTURE), output(PICTURE)])


def test_another_size_or_number_is_found():
    assert "100 x 199" in difference([output(PICTURE[1:])], [output(PICTURE)])
    assert "drew 0 figures" in difference([], [output(PICTURE)])


def test_nbval_compares_figures_with_it(pytestconfig):
    from nbval.plugin import IPyNbCell

    assert IPyNbCell.compare_outputs.compares_figures
