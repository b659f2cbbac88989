"""A tiny training for tests; as a script, run by `test_training.py` in processes of their own, also killed ones."""

import json
import os
import signal
import sys

import numpy as np
import torch
from torch import nn

from mitoseg_lib.patches import PatchDataset, train_augmentation
from mitoseg_lib.stacks import Stack
from mitoseg_lib.training import TrainingSettings, fit

STEPS = 6  # an epoch


def bright_block(seed=0):
    """Noise around a block that is brighter, in slices whose size is no multiple of anything."""
    labels = np.zeros((4, 45, 53), bool)
    labels[:, 8:30, 12:40] = True
    noise = np.random.default_rng(seed).normal(0, 20, labels.shape)
    return Stack((labels * 90 + 60 + noise).clip(0, 255).astype(np.uint8), labels)


def small_net(normalisation=nn.BatchNorm2d, dropout=0.2):
    """BatchNorm and dropout, since both carry a state from step to step."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 8) if normalisation is nn.GroupNorm else normalisation(8)
    first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(first, norm, nn.ReLU(), second, nn.Dropout2d(dropout), nn.ReLU(), nn.Conv2d(8, 1, 1))


class InterruptedPatches(PatchDataset):
    """Patches of which one, in one epoch, sends a signal to the process that made the dataset."""

    strike = None  # (epoch, patch, signal)
    target = os.getpid()

    def __getitem__(self, index):
        if self.strike is not None and (int(self._epoch[0]), index) == self.strike[:2]:
            os.kill(self.target, self.strike[2])
        return super().__getitem__(index)


def patches(strike=None, **changes):
    options = {"patch_size": 32, "patches_per_epoch": 4 * STEPS, "augmentation": train_augmentation()}
    dataset = InterruptedPatches(bright_block(), **(options | changes))
    dataset.strike = strike
    return dataset


def quick(**changes):
    return TrainingSettings(**({"epochs": 3, "batch_size": 4, "learning_rate": 0.02, "checkpoint_every": 2} | changes))


def killed(folder, epoch, patch):
    """Train until kill -9 strikes in the middle of an epoch."""
    fit(
        small_net(),
        patches((int(epoch), int(patch), signal.SIGKILL)),
        validation=bright_block(1),
        settings=quick(),
        checkpoints=folder,
    )


def shared_out(file):
    """Train with what doesn't depend on how a batch is shared out, and write down what came of it."""
    model = small_net(nn.GroupNorm, dropout=0.0)
    settings = quick(loss=nn.BCEWithLogitsLoss(), epochs=2)
    history = fit(
        model,
        patches(augmentation=None),
        validation=bright_block(1),
        settings=settings,
        checkpoints=f"{file}-checkpoints",
    )
    weights = torch.cat([values.flatten() for values in model.state_dict().values()]).tolist()
    # Each process writes its own file.
    with open(f"{file}-{os.environ.get('RANK', '0')}.json", "w") as stream:
        json.dump({"history": history.as_rows(), "weights": weights}, stream)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"killed": killed, "shared_out": shared_out}[sys.argv[1]](*sys.argv[2:])
