"""Where stacks come from: bundled with the library, downloaded once, or in a folder that is already there.

The EPFL stacks (CA1 hippocampus, FIB-SEM, 5 nm; G. Knott and M. Cantoni, EPFL; benchmark of Lucchi et al.,
2013) are read from the folder that the environment variable ``MITOSEG_DATA`` names, else from the cache that
`fetch_epfl` fills. Lucchi++ are other labels of the same stacks.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from mitoseg_lib import lucchi_plus
from mitoseg_lib.downloads import Wanted, cache_folder, downloading
from mitoseg_lib.errors import StackError, named_errors
from mitoseg_lib.stacks import Stack, file_sha256, load_stack, read_mask, verify_sha256
from mitoseg_lib.tiff import read_volume

EPFL_URL = (
    "https://documents.epfl.ch/groups/c/cv/cvlab-unit/www/data/%20ElectronMicroscopy_Hippocampus/"  # with that %20
)
EPFL_FILES = ("training.tif", "training_groundtruth.tif", "testing.tif", "testing_groundtruth.tif")
EPFL_BYTES = 129_919_357  # of each official file; their checksums were never published
EPFL_SHAPE = (165, 768, 1024)
EPFL_VOXEL_NM = (5.0, 5.0, 5.0)  # the files themselves don't state it
EXAMPLE_VOXEL_NM = (5.0, 5.0, 5.0)
EPFL_WANTED = Wanted(
    "the EPFL stacks",
    "mitoseg fetch epfl",
    "520 MB",
    f"set MITOSEG_DATA to a folder that has {', '.join(EPFL_FILES)}",
)

LUCCHI_PLUS_URL = "http://www.casser.io/files/lucchi_pp.zip"  # without TLS, so the sha256 is all that vouches for it
LUCCHI_PLUS_FILE = "lucchi_pp.zip"
LUCCHI_PLUS_SHA256 = (
    "770ce9e98fc6f29c1b1a250c637e6c5125f2b5f1260e5a7687b55a79e2e8844d"  # torch-em and micro-sam know it
)
LUCCHI_PLUS_WANTED = Wanted(
    "the Lucchi++ labels",
    "mitoseg fetch lucchi++",
    "them",
    f"set MITOSEG_DATA to a folder that has {LUCCHI_PLUS_FILE}, too",
)


def load_example(part: str) -> Stack:
    """Load a bundled synthetic stack, 60 x 432 x 432 voxels of 5 nm, with its exact labels.

    Parameters
    ----------
    part
        ``"train"`` or ``"test"``. The test stack has another contrast and noise, as another region would.

    Returns
    -------
    Stack
        Made by `mitoseg_lib.phantom`; nothing is downloaded.

    Raises
    ------
    StackError
        If `part` is another word, or the library's data files are missing or damaged.
    """
    _require_choice(part, ("train", "test"))
    folder = bundled_folder()
    if not (folder / f"phantom_{part}.tif").is_file():
        raise StackError(f"phantom_{part}.tif isn't there, but comes with the library; install mitoseg-lib again.")
    stack = load_stack(folder / f"phantom_{part}.tif", folder / f"phantom_{part}_labels.tif")
    return replace(stack, voxel_size_nm=stack.voxel_size_nm or EXAMPLE_VOXEL_NM, name=part)


def load_epfl(part: str) -> Stack:
    """Load a labelled EPFL stack: 165 x 768 x 1024 voxels of 5 nm.

    Parameters
    ----------
    part
        ``"training"`` or ``"testing"``.

    Returns
    -------
    Stack
        With labels. From the folder that ``MITOSEG_DATA`` names, else from the cache; what isn't there yet is
        downloaded first (see `fetch_epfl`).

    Raises
    ------
    StackError
        If the files can't be had, were changed since `fetch_epfl` accepted them, or aren't the EPFL stacks.
    """
    _require_choice(part, ("training", "testing"))
    image, labels = f"{part}.tif", f"{part}_groundtruth.tif"
    folder = _given_folder()
    if folder is None:
        folder = cache_folder("epfl")
        if not all(_is_recorded(folder, name) for name in (image, labels)):
            fetch_epfl()
        for name in (image, labels):
            _verify_record(folder, name)
    stack = load_stack(folder / image, folder / labels, voxel_size_nm=EPFL_VOXEL_NM)
    with named_errors(image):
        _require_epfl_shape(stack.shape)
    return replace(stack, name=part)


def fetch_epfl(*, base_url: str | None = None) -> Path:
    """Download the four files of the EPFL stacks (520 MB), unless they are there already.

    Each file is downloaded beside its place, checked (size of the official files, structure, values), and
    only then renamed; its sha256 is recorded in the cache and compared on every later load. Two calls at once
    do no harm.

    Parameters
    ----------
    base_url
        Address of a folder that holds the files, ending in ``/``; by default EPFL's own, and only there is
        the size checked.

    Returns
    -------
    pathlib.Path
        The folder that holds the files: the one that ``MITOSEG_DATA`` names (nothing is downloaded, and
        nothing written into it), else the cache, which is the user's cache folder or the one that
        ``MITOSEG_CACHE`` names.

    Raises
    ------
    StackError
        If a download fails, breaks off or brings something else, or the disk is full. Files that came whole
        before that are kept, and the next call goes on after them.
    """
    given = _given_folder()
    if given is not None:
        return given
    folder = cache_folder("epfl")
    for name in EPFL_FILES:
        try:
            _verify_record(folder, name)
        except StackError:  # not there, or not what was recorded
            _download(base_url or EPFL_URL, name, folder)
    return folder


def load_lucchi_plus(part: str) -> Stack:
    """Load a stack of EPFL's with the labels that V. Casser et al. drew anew (Lucchi++, MIDL 2020).

    Parameters
    ----------
    part
        ``"training"`` or ``"testing"``.

    Returns
    -------
    Stack
        With the image of `load_epfl`, so that what was predicted there can be compared with both labels. What isn't
        there yet is downloaded first (see `fetch_lucchi_plus`).

    Raises
    ------
    StackError
        If the files can't be had or have changed, or if the images that come with the labels show other tissue than
        EPFL's.
    """
    _require_choice(part, ("training", "testing"))
    path = fetch_lucchi_plus()
    stack = load_epfl(part)
    lucchi_plus.require_same_tissue(path, part, stack.image)
    labels = lucchi_plus.read_labels(path, part, EPFL_SHAPE)
    return replace(stack, labels=labels, name=f"{part}, Lucchi++")


def fetch_lucchi_plus(*, url: str | None = None) -> Path:
    """Download the zip of the re-annotated labels, unless it is there already.

    It is downloaded beside its place, checked (sha256, then number, size and values of all labels), and only then
    renamed. Its sha256 is compared on every later call, too. The zip couldn't be fetched when this was written, so
    what is known of it, the sha256 and the names of the files in it, was taken from the code of others that reads
    it (`mitoseg_lib.lucchi_plus` says whose).

    Parameters
    ----------
    url
        Address of the file; by default its author's. The sha256 must be the same.

    Returns
    -------
    pathlib.Path
        The zip: in the folder that ``MITOSEG_DATA`` names if it is there, else in the cache.

    Raises
    ------
    StackError
        If the download fails, breaks off or brings something else, the disk is full, or the zip in the folder that
        ``MITOSEG_DATA`` names is another.
    """
    given = os.environ.get("MITOSEG_DATA")
    if given and (path := Path(given) / LUCCHI_PLUS_FILE).is_file():
        verify_sha256(path, LUCCHI_PLUS_SHA256)
        return path
    folder = cache_folder("lucchi++")
    path = folder / LUCCHI_PLUS_FILE
    if path.is_file() and file_sha256(path) == LUCCHI_PLUS_SHA256:
        return path
    with downloading(url or LUCCHI_PLUS_URL, LUCCHI_PLUS_FILE, folder, LUCCHI_PLUS_WANTED) as unfinished:
        _check_lucchi_plus(unfinished)
        os.replace(unfinished, path)
    return path


def describe_epfl() -> dict[str, object]:
    """Say which copy of the EPFL stacks `load_epfl` reads: what a recorded run keeps of its data.

    Returns
    -------
    dict
        ``name``: "epfl-official" where all files have the size of the official ones, else "epfl-rebuilt" (see the data
        page); ``sha256``: that of each file, by name.

    Raises
    ------
    StackError
        If the files can't be had.
    """
    folder = fetch_epfl()
    official = all((folder / name).stat().st_size == EPFL_BYTES for name in EPFL_FILES)
    return {
        "name": "epfl-official" if official else "epfl-rebuilt",
        "sha256": {name: file_sha256(folder / name) for name in EPFL_FILES},
    }


def describe_example() -> dict[str, object]:
    """Return the name and the files' sha256 of the bundled stacks, as `describe_epfl` does."""
    files = sorted(bundled_folder().glob("phantom_*.tif"))
    return {"name": "phantom", "sha256": {path.name: file_sha256(path) for path in files}}


def _require_choice(part: str, choices: tuple[str, str]) -> None:
    if part not in choices:
        raise StackError(f"{part!r} was asked for, but there are only {choices[0]!r} and {choices[1]!r}; choose one.")


def bundled_folder() -> Path:
    """Folder of the bundled stacks: inside an installed wheel, beside the library in a checkout."""
    library = Path(__file__).parent
    installed = library / "_data"
    return installed if installed.is_dir() else library.parent / "data"


def _given_folder() -> Path | None:
    """Folder that MITOSEG_DATA names, with all four files in it; None where the variable isn't set."""
    given = os.environ.get("MITOSEG_DATA")
    if not given:
        return None
    folder = Path(given)
    missing = [name for name in EPFL_FILES if not (folder / name).is_file()]
    if missing:
        raise StackError(
            f"MITOSEG_DATA is {given!r}, a folder without {', '.join(missing)}, but all four of"
            f" {', '.join(EPFL_FILES)} were expected; name another folder, or unset it."
        )
    return folder


def _record(folder: Path, name: str) -> Path:
    """File that holds the sha256 of an accepted file, in the format of the program sha256sum."""
    return folder / f"{name}.sha256"


def _is_recorded(folder: Path, name: str) -> bool:
    """Whether a file in the cache was once accepted."""
    return (folder / name).is_file() and _record(folder, name).is_file()


def _verify_record(folder: Path, name: str) -> None:
    """Raise StackError unless a file is in the cache and still what was accepted."""
    if not _is_recorded(folder, name):
        raise StackError(f"{name} isn't in the cache, but the EPFL stack was expected; run `mitoseg fetch epfl`.")
    recorded = _record(folder, name).read_bytes().decode("ascii", "replace").split()
    try:
        verify_sha256(folder / name, recorded[0] if recorded else "")
    except StackError as error:
        raise StackError(f"{str(error).rstrip('.')} with `mitoseg fetch epfl`.") from None


def _download(base_url: str, name: str, folder: Path) -> None:
    """Download one file beside its place, check it, record its sha256 and rename it to its place."""
    with downloading(base_url + name, name, folder, EPFL_WANTED) as path:
        _check_epfl_file(path, EPFL_BYTES if base_url == EPFL_URL else None)
        _record(path.parent, name).write_text(f"{file_sha256(path)}  {name}\n", encoding="ascii")
        os.replace(_record(path.parent, name), _record(folder, name))
        os.replace(path, folder / name)


def _check_epfl_file(path: Path, size: int | None) -> None:
    """Raise StackError unless a download has the structure, and if it is known the size, of an EPFL file."""
    is_mask = path.stem.endswith("_groundtruth")
    values = read_mask(path) if is_mask else read_volume(path)[0]
    with named_errors(path):
        _require_epfl_shape(values.shape)
        if values.dtype not in (np.uint8, np.bool_):
            raise StackError(f"holds {values.dtype}, but the EPFL stacks are uint8; download it again")
        if is_mask and (values.all() or not values.any()):
            raise StackError("holds one value only, but 0 and 255 were expected; download it again")
        if size is not None and path.stat().st_size != size:
            raise StackError(f"has {path.stat().st_size:,} bytes, but {size:,} were expected; download it again")


def _require_epfl_shape(shape: tuple[int, ...]) -> None:
    if shape != EPFL_SHAPE:
        raise StackError(f"has shape {shape}, but the EPFL stacks have {EPFL_SHAPE}; get the official files")


def _check_lucchi_plus(path: Path) -> None:
    """Raise StackError unless a download is the known zip, with all labels in it."""
    found = file_sha256(path)
    with named_errors(path):
        if found != LUCCHI_PLUS_SHA256:
            raise StackError(
                f"has {path.stat().st_size:,} bytes and the sha256 {found[:12]}..., but {LUCCHI_PLUS_SHA256[:12]}..."
                " was expected; look at its address what it is now"
            )
    for part in lucchi_plus.FOLDERS:
        lucchi_plus.read_labels(path, part, EPFL_SHAPE)
