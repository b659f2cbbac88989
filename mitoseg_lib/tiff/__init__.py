"""TIFF files read strictly, as volumes: directories to pages, descriptions to voxel sizes, pages to a volume.

`mitoseg_lib.stacks` is the door for whole stacks, `mitoseg_lib.readers` the one for slices at a time.
"""

from mitoseg_lib.tiff.metadata import VoxelSize
from mitoseg_lib.tiff.slabs import TiffVolume
from mitoseg_lib.tiff.volume import read_volume

__all__ = ["TiffVolume", "VoxelSize", "read_volume"]
