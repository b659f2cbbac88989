"""Steps that depend on one another, done by the workers of a Dask cluster.

Dask's scheduler could be handed the whole graph. It is given as many steps as there are workers instead, for two
reasons: no worker ever holds a second step in its memory, and when a worker dies, it is clear which step it died of.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import psutil
import torch
from tqdm.auto import tqdm

from mitoseg_lib.errors import StackError
from mitoseg_lib.memory import ENVIRONMENT
from mitoseg_lib.volumes.job import VolumeError
from mitoseg_lib.writers import FULL_DISK

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["Step", "connected_cluster", "local_cluster", "run_steps"]

BASE_MEMORY, PIXEL_MEMORY = 1.0e9, 500.0  # bytes of a worker, and for each pixel of a slice: measured, with room

CONNECT_SECONDS = 20
SETTINGS = {
    # A worker's death is counted here, and never answered by giving its step to the next one to die of it.
    "distributed.scheduler.allowed-failures": 0,
    # Nothing here can be spilled to the disk, and a worker that pauses would wait for ever.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.comm.timeouts.connect": "60s",
    **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in ENVIRONMENT.items()},
}
BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left"


@dataclass(frozen=True)
class Step:
    """Something to do once other steps are done.

    Attributes
    ----------
    name
        Of its marker.
    needs
        Names of other steps.
    work
        What a worker calls; it can be pickled.
    words
        What a message calls it, such as "predicting slices 0 to 31".
    weight
        How long it takes, beside the others.
    """

    name: str
    needs: tuple[str, ...]
    work: Callable[[], None]
    words: str
    weight: float = 1.0


@contextmanager
def local_cluster(workers: int | None = None, *, plane: tuple[int, int], device: str = "cpu") -> Iterator[Client]:
    """Start workers on this machine, one process each, and yield a Dask client of theirs.

    Parameters
    ----------
    workers
        How many; by default one for a GPU, and else one for each core, or fewer if the memory that is free suffices
        only for them.
    plane
        Pixels of a slice, (y, x), from which the memory is estimated.
    device
        "cpu" or "cuda".
    """
    import dask
    from distributed import Client, LocalCluster

    with dask.config.set(SETTINGS):
        cluster = LocalCluster(
            n_workers=workers or (1 if device == "cuda" else fitting_workers(plane)),
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
        with cluster, Client(cluster, set_as_default=False) as client:
            yield client


@contextmanager
def connected_cluster(address: str) -> Iterator[Client]:
    """Yield a client of a Dask cluster that runs already, with one worker at least; VolumeError if there is none.

    Its scheduler's own setting says how often a step is given to other workers after the death of one
    (``distributed.scheduler.allowed-failures``).
    """
    from distributed import Client

    with ExitStack() as stack:
        try:
            client = stack.enter_context(Client(address, timeout=CONNECT_SECONDS, set_as_default=False))
            client.wait_for_workers(1, timeout=2 * CONNECT_SECONDS)
        except (OSError, TimeoutError, ValueError) as error:
            raise VolumeError(
                f"No Dask cluster with workers answers at {address} ({type(error).__name__}), but the address of its"
                " scheduler was expected; check it, or leave out --scheduler."
            ) from None
        yield client


def fitting_workers(plane: tuple[int, int]) -> int:
    """Return how many workers cores and free memory allow for slices of so many pixels, (y, x); at least 1."""
    needed = BASE_MEMORY + PIXEL_MEMORY * plane[0] * plane[1]
    return max(1, min(os.cpu_count() or 1, int(psutil.virtual_memory().available // needed)))


def run_steps(
    steps: Sequence[Step], client: Client, *, is_done: Callable[[str], bool], progress: bool = False
) -> dict[str, Step]:
    """Do all steps that aren't done, in an order that their needs allow.

    A step whose worker dies, most often for lack of memory, is done again at the end, alone; if it kills a worker
    again, it has failed, and steps that need it aren't begun, but all others are done.

    Parameters
    ----------
    steps
        All of them; those they need are among them.
    client
        A Dask client.
    is_done
        Whether a step has left its marker.
    progress
        Show a bar on stderr.

    Returns
    -------
    dict
        The steps that failed, by name.

    Raises
    ------
    StackError
        If the input is damaged or the disk is full; what is done stays.
    VolumeError
        If the scheduler is gone; what is done stays.
    """
    waiting = [step for step in steps if not is_done(step.name)]
    total = sum(step.weight for step in steps)
    with tqdm(total=round(total), disable=not progress, unit="slice", bar_format=BAR) as bar:
        bar.update(round(total - sum(step.weight for step in waiting)))
        return _Run(waiting, client, bar).finish()


class _Run:
    """The state of `run_steps`."""

    def __init__(self, steps: Sequence[Step], client: Client, bar: tqdm) -> None:
        self.client, self.bar = client, bar
        self.steps = steps  # that aren't done; earlier ones first
        names = {step.name for step in steps}
        self.missing = {step.name: len(names.intersection(step.needs)) for step in steps}
        self.needed_by: dict[str, list[int]] = {name: [] for name in names}
        for number, step in enumerate(steps):
            for name in names.intersection(step.needs):
                self.needed_by[name].append(number)
        self.ready = [number for number, step in enumerate(steps) if not self.missing[step.name]]  # a heap
        self.running: dict[Future, Step] = {}
        self.lost: list[Step] = []  # whose worker died once
        self.failed: dict[str, Step] = {}

    def finish(self) -> dict[str, Step]:
        """Do what can be done, and return what failed."""
        from distributed import CancelledError
        from distributed.comm import CommClosedError

        try:
            with self.client.as_current():  # `wait` asks for the current one
                while self._begin() or self.running:
                    self._wait()
                    if not self.running and not self.ready:
                        self._again()
        except (CancelledError, CommClosedError, TimeoutError) as error:
            raise VolumeError(
                f"The scheduler can't be reached any more ({type(error).__name__}), but what is done is kept; the same"
                " command goes on from there."
            ) from None
        finally:
            self.client.cancel(list(self.running))
        return self.failed

    def _begin(self) -> bool:
        """Hand out as many steps as workers are free, and tell whether any was."""
        free = max(1, sum(self.client.nthreads().values())) - len(self.running)
        begun = [heappop(self.ready) for _ in range(min(free, len(self.ready)))]
        for number in begun:
            self._submit(self.steps[number])
        return bool(begun)

    def _submit(self, step: Step) -> None:
        self.bar.set_description(step.words)
        # Under a key of its own each time, since Dask keeps what became of a key.
        future = self.client.submit(step.work, key=f"{step.name}-{os.urandom(4).hex()}", pure=False)
        self.running[future] = step

    def _wait(self) -> None:
        """Wait for a step to end, and take note of how."""
        from distributed import wait

        for future in wait(list(self.running), return_when="FIRST_COMPLETED").done:
            step = self.running.pop(future)
            if self._survived(future, step):
                self._done(step)
            else:
                self.lost.append(step)

    def _done(self, step: Step) -> None:
        """Take note of a step that is done: others may be ready now."""
        self.bar.update(step.weight)
        for number in self.needed_by[step.name]:
            name = self.steps[number].name
            self.missing[name] -= 1
            if not self.missing[name]:
                heappush(self.ready, number)

    def _survived(self, future: Future, step: Step) -> bool:
        """Tell whether a step's worker lived; raise what else went wrong."""
        from distributed import KilledWorker

        if future.status == "cancelled":
            future.result()
        error = future.exception()
        if error is None:
            return True
        if isinstance(error, KilledWorker) or _is_lack_of_memory(error):
            return False
        raise _in_words(error, step)

    def _again(self) -> None:
        """Do what was lost once more, each step alone."""
        while self.lost:
            step = self.lost.pop(0)
            self._submit(step)
            self._wait()
            if self.lost and self.lost[-1] is step:
                self.failed[step.name] = self.lost.pop()


def _is_lack_of_memory(error: BaseException) -> bool:
    is_torchs = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_torchs


def _in_words(error: BaseException, step: Step) -> BaseException:
    """Turn what a step raised into a sentence."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return StackError(
            f"The disk is full ({error.strerror}) while {step.words}, but what is done is kept; make room, and the same"
            " command goes on from there."
        )
    if isinstance(error, OSError):
        reason = error.strerror or errno.errorcode.get(error.errno, str(error))
        return StackError(f"A file can't be read or written ({reason}) while {step.words}; check its disk.")
    return error
