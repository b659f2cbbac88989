"""TIFF files read strictly, as volumes: directories to pages, descriptions to voxel sizes, pages to a volume.

`mitoseg_lib.stacks` is the door; nothing else needs to come in here.
"""

from mitoseg_lib.tiff.metadata import VoxelSize
from mitoseg_lib.tiff.volume import read_volume

__all__ = ["VoxelSize", "read_volume"]
