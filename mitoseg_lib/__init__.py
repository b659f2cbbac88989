"""Segment mitochondria in electron-microscopy stacks: the small library under the course 'Mitochondria in 3D'.

Arrays are ``(z, y, x)``; images uint8; masks bool; probabilities float32 in [0, 1]; voxel sizes in nm, ``(z, y, x)``.
Nothing heavy is imported here: import the module that you need, for example ``from mitoseg_lib import stacks``.
"""

from importlib import metadata

try:
    __version__ = metadata.version("mitoseg-lib")
except metadata.PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
