"""Files that are downloaded once into a cache: beside their place first, and in it only when they were accepted."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mitoseg_lib.errors import StackError

__all__ = ["Wanted", "cache_folder", "downloading"]


@dataclass(frozen=True)
class Wanted:
    """What a message says of a download that failed.

    Attributes
    ----------
    what
        What was asked for, as a plural: "the EPFL stacks".
    command
        The command that fetches it.
    room
        What the cache must have room for.
    instead
        What to do for those who can't download it.
    """

    what: str
    command: str
    room: str
    instead: str


def cache_folder(name: str) -> Path:
    """Return a data set's folder in the user's cache, or in the cache that ``MITOSEG_CACHE`` names."""
    import pooch  # here, because it takes long to import and few calls need it

    return Path(os.environ.get("MITOSEG_CACHE") or pooch.os_cache("mitoseg_lib")) / name


@contextmanager
def downloading(url: str, name: str, folder: Path, wanted: Wanted) -> Iterator[Path]:
    """Download a file, hand out the path where it lies for the moment, and remove what is left there in the end.

    Inside, check the file and rename it to its place in `folder`. It is on the same disk, so the rename can't be half
    done, and two downloads at once do no harm.

    Parameters
    ----------
    url
        Address of the file.
    name
        What the file is called, in `folder` and in messages.
    folder
        Made if need be.
    wanted
        What messages say.

    Raises
    ------
    StackError
        If the download fails or breaks off, or the disk is full, also inside.
    """
    import pooch
    import requests

    downloader = pooch.HTTPDownloader(progressbar=True, chunk_size=2**20)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder) as temporary:
            path = Path(temporary) / name
            downloader(url, str(path), None)
            yield path
    except requests.HTTPError as error:
        raise _failed(name, f"the server answered {error.response.status_code}", "look for it there", wanted) from None
    except requests.RequestException:
        remedy = f"run `{wanted.command}` online"
        raise _failed(name, "there is no connection, or it broke off", remedy, wanted) from None
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = f"make room for {wanted.room} in the cache" if is_full else "set MITOSEG_CACHE to a folder of your own"
        raise _failed(name, error.strerror or type(error).__name__, remedy, wanted) from None


def _failed(name: str, reason: str, remedy: str, wanted: Wanted) -> StackError:
    return StackError(
        f"{name} couldn't be downloaded ({reason}), but {wanted.what} were asked for; {remedy}, or {wanted.instead}."
    )
