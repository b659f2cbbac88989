"""Files that are whole or not there, and the sha256 beside them."""

import os
from pathlib import Path

UNFINISHED = ".part"


def hash_path(path: Path) -> Path:
    """Return the file beside a file that holds its sha256."""
    return path.with_name(path.name + ".sha256")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or not there, even if the power fails; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    with open(unfinished, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(path)
    if os.name == "posix":  # the rename itself is on the disk once the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
