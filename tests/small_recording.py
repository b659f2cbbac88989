"""A recipe on small stacks; as a script, run by `test_recording.py` in processes of their own that a signal ends."""

import sys

import numpy as np
import torch
from small_training import InterruptedPatches

from mitoseg_lib import recipes, recording
from mitoseg_lib.stacks import Stack

SHAPE = (40, 64, 72)


def coded_stack(data="phantom", part="train"):
    """A block that is brighter than its surroundings, and in a corner of each slice the slice's number."""
    labels = np.zeros(SHAPE, bool)
    labels[:, 20:44, 16:50] = True
    noise = np.random.default_rng({"train": 0, "test": 1}[part]).normal(0, 15, SHAPE)
    image = (labels * 90 + 60 + noise).clip(0, 255).astype(np.uint8)
    image[:, 0, 0] = np.arange(len(image))
    return Stack(image, labels)


def slice_numbers(image):
    return image[:, 0, 0].tolist()


def record_until(folder, epoch, patch, number):
    """Run the command until a patch is asked for that sends a signal to this process."""
    from mitoseg_lib.cli import app

    InterruptedPatches.strike = (int(epoch), int(patch), int(number))
    recipes.PatchDataset, recording._load = InterruptedPatches, coded_stack
    app(["run", "check", "--data", "phantom", "--output", folder, "--threads", "1"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    record_until(*sys.argv[1:])
