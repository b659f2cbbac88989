"""The one error that bad input raises, and the one warning; `mitoseg_lib.stacks` hands both on: import from there."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

FilePath = str | os.PathLike[str]


class StackError(ValueError):
    """Bad input: one sentence that says which file, what was found, what was expected, and what to do."""


class StackWarning(UserWarning):
    """What a person should know of input that was accepted: one sentence."""


def damaged(what: str) -> StackError:
    """StackError for a file that isn't as its writer left it; `named_errors` adds the file's name."""
    return StackError(f"is damaged or cut off ({what}), but a whole TIFF stack was expected; get the file again")


@contextmanager
def named_errors(path: FilePath) -> Iterator[None]:
    """Turn whatever goes wrong with a file into a StackError that begins with the file's name.

    Only the name, not its folder: messages end up in notebooks that are shared. A path that leads nowhere is
    given whole, since then the folder may be what is wrong.
    """
    whole = os.fsdecode(path)
    name = os.path.basename(whole) or whole
    try:
        yield
    except StackError as error:
        raise StackError(f"{name} {error}.") from None
    except (FileNotFoundError, NotADirectoryError):
        raise StackError(f"{whole} doesn't exist, but a file was expected; check the path.") from None
    except OSError as error:
        reason = error.strerror or error
        raise StackError(f"{name} can't be read ({reason}); check its permissions and its disk.") from error
    except MemoryError:
        raise StackError(f"{name} doesn't fit into memory; cut a smaller stack from it.") from None
    except Exception as error:  # decoders raise errors of many kinds for bytes that make no sense to them
        raise StackError(f"{name} {damaged(' '.join(str(error).split())[:200])}.") from error


def require_file(path: FilePath) -> None:
    """Raise StackError for a folder, or for a device or pipe, where reading might never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise StackError(f"is {what}, but a TIFF file was expected; give the path of the file")
