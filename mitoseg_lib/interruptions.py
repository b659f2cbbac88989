"""What a training needs in order to be interrupted and go on as the same: signals, random states, its identity."""

import hashlib
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from mitoseg_lib.checkpoints import CheckpointError, State
from mitoseg_lib.stacks import Stack


class StopRequest:
    """A signal handler that remembers the signal, so that the step can end first."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take note; a second Ctrl-C doesn't wait."""
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    @property
    def name(self) -> str:
        """The signal's name, for messages."""
        return signal.Signals(self.number).name if self.number else "a signal to another process"


@contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Take Ctrl-C and SIGTERM for a while, and put the previous handlers back."""
    stop = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        numbers = ()
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave_signals_to_the_main_process(_: int) -> None:
    """Let a worker live on after Ctrl-C, which reaches it too, until the main process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def own_random_states() -> Iterator[None]:
    """Put the caller's random states back afterwards."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def random_states() -> State:
    """Return the states of all global generators of random numbers."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: State) -> None:
    """Put back what `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():  # a checkpoint may come from another machine
        torch.cuda.set_rng_state_all(states["cuda"])


def seed_everything(seed: int) -> None:
    """Seed all global generators of random numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def training_identity(model: nn.Module, train: Dataset, validation: Stack) -> dict[str, Any]:
    """Return what says which training this is, besides its settings: hashes of the model and of the data."""
    return {
        "model": _model_digest(model),
        "patches per epoch": len(train),
        "patches": _patches_digest(train),
        "validation": _digest([validation.image, validation.require_labels()]),
    }


def _model_digest(model: nn.Module) -> str:
    """Return a hash of a model's kind: its weights' names and shapes, and the values of those that stay as they are.

    Not of the values that training changes: after a resumption these come from the checkpoint.
    """
    frozen = [values.detach().cpu().numpy() for values in model.parameters() if not values.requires_grad]
    trained = {name for name, values in model.named_parameters() if values.requires_grad}
    outline = [(name, tuple(v.shape), str(v.dtype), name in trained) for name, v in model.state_dict().items()]
    return _digest([np.frombuffer(repr(outline).encode(), np.uint8), *frozen])


def _patches_digest(train: Dataset) -> str:
    """Return a hash of an epoch's first patches, in which stack, seed, size and augmentation show."""
    if hasattr(train, "set_epoch"):
        train.set_epoch(0)
    items = [train[i] for i in range(min(4, len(train)))]
    return _digest([tensor.numpy() for item in items for tensor in item])


def _digest(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def require_same(wanted: dict[str, Any], found: dict[str, Any], folder: str) -> None:
    """Raise CheckpointError where a folder's checkpoints are another training's."""
    other = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    if other:
        listed = ", ".join(f"{name} was {found.get(name)} and is {wanted.get(name)}" for name in sorted(other))
        raise CheckpointError(
            f"{folder} holds the checkpoints of another training ({listed}), but this one's were expected; "
            "give each training a folder of its own, or repeat that one's settings."
        )
