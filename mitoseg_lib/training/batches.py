"""Which patches make a step, and how they are loaded."""

import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from mitoseg_lib.interruptions import leave_signals_to_the_main_process


class Batches(Sampler[list[int]]):
    """The patch numbers of this process's share of each batch of an epoch, from batch `first` on.

    In order, since the patches are random already.
    """

    def __init__(self, train: Dataset, batch_size: int, accelerator: Accelerator) -> None:
        n_patches, processes = len(train), accelerator.num_processes
        if n_patches == 0 or n_patches % batch_size or batch_size % processes:
            raise ValueError(
                f"There are {n_patches} patches in an epoch, in batches of {batch_size}, for {processes} process(es), "
                "but each must be a multiple of the next, so that all steps are alike; change patches_per_epoch or "
                "batch_size."
            )
        self.n_batches, self.batch_size, self.share = n_patches // batch_size, batch_size, batch_size // processes
        self.offset = accelerator.process_index * self.share
        self.first = 0

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return self.n_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of patch numbers."""
        for batch in range(self.first, self.n_batches):
            start = batch * self.batch_size + self.offset
            yield list(range(start, start + self.share))


def patch_loader(train: Dataset, batches: Batches, workers: int | None, device: torch.device) -> DataLoader:
    """Return what loads the batches, in so many processes, or by default in as many as pay."""
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    return DataLoader(
        train,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
        # Its own: a loader draws a number from the global one at each start, also at that after a resumption.
        generator=torch.Generator(),
    )
