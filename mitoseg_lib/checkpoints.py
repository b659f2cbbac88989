"""Checkpoints of a training: whole or not there, checked before they are read, and never a pickle.

A checkpoint is one safetensors file. Its tensors are the model's weights (names ``model.*``, so that any safetensors
reader can open them) and the other arrays of the training's state; what isn't an array (counters, rates, history) is
JSON in the file's header. A pickle could run code when it is opened; this can't.

safetensors opens a file with a flipped bit without a word. So beside each file lies ``NAME.sha256``, as ``sha256sum``
writes it, and nothing is read that doesn't match. The hash is written first and the file last, each under another
name, flushed to the disk and then renamed: whatever kills the process, a file with its proper name is whole.
"""

import hashlib
import json
import os
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from mitoseg_lib.files import UNFINISHED, hash_path, write_whole

KEPT = 2  # checkpoints of each kind
State = dict[str, Any]
Place = tuple[int, int]  # whole epochs, and steps of the next one


class CheckpointError(ValueError):
    """A checkpoint that can't be used: one sentence that says what was found, what was expected, and what to do."""


class CheckpointFolder:
    """The checkpoints of one training: the two last, and the two best.

    Files are called ``last-EPOCHS-STEPS.safetensors`` (everything that a training needs to go on) and
    ``best-EPOCHS-STEPS.safetensors`` (the weights with the best validation so far). The numbers are the place in the
    training: so many whole epochs, and so many steps of the next one.

    Parameters
    ----------
    folder : Path
        Made if need be. Use one for each training.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def save_last(self, state: State, place: Place) -> None:
        """Write the whole state, then remove all but the two newest checkpoints of each kind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_state(self._path("last", place), state)
        # Only now: the two newest best weights are those that the two newest states speak of.
        for kind in ("last", "best"):
            for old in self.places(kind)[:-KEPT]:
                self._remove(kind, old)

    def save_best(self, model: nn.Module, place: Place) -> None:
        """Write the model's weights as the best so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_state(self._path("best", place), {"model": model.state_dict()})

    def load_last(self) -> tuple[State, Place] | None:
        """Return the newest state that is whole, and its place; None if there is no checkpoint at all.

        Raises
        ------
        CheckpointError
            If there are checkpoints, but each is damaged. One damaged checkpoint is a warning.
        """
        places = self.places("last")
        for place in reversed(places):
            try:
                return read_state(self._path("last", place)), place
            except CheckpointError as error:
                warnings.warn(f"{error} Trying the checkpoint before it.", stacklevel=2)
        if places:
            raise CheckpointError(
                f"No checkpoint in {self.folder} is whole ({len(places)} looked at), but at least one was expected; "
                "restore the folder from a copy, or choose a new folder to start again."
            )
        return None

    def load_best(self, model: nn.Module) -> int:
        """Load the best weights into a model of the same kind, and return the number of epochs that made them.

        Raises
        ------
        CheckpointError
            If there are none, they are damaged, or they are another model's.
        """
        places = self.places("best")
        if not places:
            raise CheckpointError(
                f"{self.folder} holds no best-*.safetensors, but those of one epoch or more were expected; train first."
            )
        _fill(model, self._path("best", places[-1]))
        return places[-1][0]

    def remove_after(self, place: Place) -> None:
        """Remove what is newer than a place, and files that a killed process left unfinished.

        A training that goes on from there makes the newer ones again; until then they are damaged, or belong to a
        past that didn't happen.
        """
        for kind in ("last", "best"):
            for newer in self.places(kind):
                if newer > place:
                    self._remove(kind, newer)
        for leftover in self.folder.glob(f"*{UNFINISHED}"):
            leftover.unlink()

    def places(self, kind: str) -> list[Place]:
        """Return the places of the files of a kind, ascending; a file whose hash alone is left counts too."""
        pattern = re.compile(rf"{kind}-(\d+)-(\d+)\.safetensors(\.sha256)?")
        names = (pattern.fullmatch(path.name) for path in self.folder.glob(f"{kind}-*"))
        return sorted({(int(match[1]), int(match[2])) for match in names if match})

    def _path(self, kind: str, place: Place) -> Path:
        epochs, steps = place
        return self.folder / f"{kind}-{epochs:04d}-{steps:06d}.safetensors"

    def _remove(self, kind: str, place: Place) -> None:
        """Remove the hash last: what is left then looks damaged, never whole."""
        path = self._path(kind, place)
        path.unlink(missing_ok=True)
        hash_path(path).unlink(missing_ok=True)


def _fill(model: nn.Module, path: Path) -> None:
    """Load a checkpoint's weights into a model; CheckpointError if it is damaged, or they are another model's."""
    weights = read_state(path)["model"]
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise CheckpointError(
            f"{path.name} holds {len(weights)} tensors that don't fit this {type(model).__name__} of "
            f"{len(model.state_dict())}; make the model as it was made for the training."
        ) from None


def write_state(path: Path, state: State) -> None:
    """Write nested dicts, lists, numbers, strings, tensors and arrays as one safetensors file with its sha256."""
    tensors: dict[str, Tensor] = {}
    structure = _pack(state, "", tensors)
    content = tensors_to_bytes(tensors, metadata={"state": json.dumps(structure)})
    digest = hashlib.sha256(content).hexdigest()
    write_whole(hash_path(path), f"{digest}  {path.name}\n".encode())
    write_whole(path, content)


def read_state(path: Path) -> State:
    """Read what `write_state` wrote; tensors come back in the CPU's memory, arrays as NumPy arrays.

    Raises
    ------
    CheckpointError
        If the file or its hash is missing, or they don't match.
    """
    try:
        expected = hash_path(path).read_text().split()[0]
        content = path.read_bytes()
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path.name} or its .sha256 can't be read ({type(error).__name__}).") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise CheckpointError(f"{path.name} is damaged: its sha256 isn't the one that was written with it.")
    try:
        (length,) = struct.unpack_from("<Q", content)
        structure = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["state"])
        return _unpack(structure, tensors_from_bytes(content))
    except (struct.error, KeyError, TypeError, ValueError, SafetensorError):
        raise CheckpointError(
            f"{path.name} is a safetensors file of another kind; give one that this library wrote."
        ) from None


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return the JSON form of a value, and put its tensors aside under names that say where they were.

    A dict becomes a list of pairs, since JSON's keys can only be strings and an optimizer's are numbers.
    """
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, Tensor | np.ndarray):
        name = name.removeprefix(".")
        while name in tensors:  # {"a.b": ...} and {"a": {"b": ...}}
            name += "'"
        is_tensor = isinstance(value, Tensor)
        # A copy: safetensors refuses tensors that share memory, as tied weights do.
        tensors[name] = (value.detach().cpu() if is_tensor else torch.from_numpy(value)).contiguous().clone()
        return {"tensor" if is_tensor else "array": name}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint can't hold; use numbers, text or tensors.")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the value that `_pack` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_unpack(item, tensors) for item in content)
    return tensors[content] if kind == "tensor" else tensors[content].numpy()
