"""A synthetic FIB-SEM stack of neuropil with exact truth: what the small preset and the tests use instead of tissue.

Inside, `shapes` has random numbers, smooth noise and tubes; `scene` decides what lies where; `drawing` draws it and
takes the picture; `bundled` writes the stacks that come with the course, as ``python -m mitoseg_lib.phantom FOLDER``
does.
"""

from mitoseg_lib.phantom.bundled import BUNDLED, write_bundled
from mitoseg_lib.phantom.drawing import Imaging, make_phantom

__all__ = ["BUNDLED", "Imaging", "make_phantom", "write_bundled"]
