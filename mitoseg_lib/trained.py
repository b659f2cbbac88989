"""Models that recorded runs have trained, and what they predict.

The last predictions of whole stacks are kept in memory, so that measurements of one process share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mitoseg_lib.choices import Choice
from mitoseg_lib.files import hash_path
from mitoseg_lib.inference import predict_stack, predict_turned, predict_views
from mitoseg_lib.models import for_single_slices
from mitoseg_lib.recipes import Recipe, recipe_named
from mitoseg_lib.recording import first_choice, weights_path
from mitoseg_lib.runs import RESULTS, Preset, read_run, run_path
from mitoseg_lib.stacks import Stack
from mitoseg_lib.weights import WeightsMetadata, load_weights, read_metadata

__all__ = ["KEPT", "STURDY", "Bench", "Trained"]

KEPT = "ladder-longer"  # the best recipe on the same tissue, which chapter 7 takes apart
STURDY = "ladder-sturdy"  # the same with strong augmentation, for other microscopes: its model is shipped
SEEDS = (0, 1, 2)
KEPT_PREDICTIONS = 4  # of the last ones, in memory: 0.5 GB each for EPFL's stack

Probabilities = NDArray[np.float32]


def _predict_alone(model: nn.Module, image: NDArray[np.uint8], **options: Any) -> Probabilities:
    """Predict with each slice in place of its neighbours."""
    return predict_stack(for_single_slices(model), image, **options)


WAYS = {"plain": predict_stack, "turned": predict_turned, "views": predict_views, "alone": _predict_alone}


@dataclass(frozen=True)
class Trained:
    """A run's weights, as they were when this was made.

    Attributes
    ----------
    path : Path
        Of the weights.
    sha256 : str
        Of that file.
    precision : str
        For predictions, as in the run.
    """

    path: Path
    sha256: str
    precision: str


@lru_cache(maxsize=2)
def _stack(data: str, part: str) -> Stack:
    return Preset("small" if data == "phantom" else "full").load(part)


@lru_cache(maxsize=2)
def _model(trained: Trained) -> nn.Module:
    return load_weights(trained.path)[0].to("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=KEPT_PREDICTIONS)
def _test_probabilities(trained: Trained, data: str, way: str) -> Probabilities:
    found = WAYS[way](_model(trained), _stack(data, "test").image, precision=trained.precision)
    found.flags.writeable = False  # others will get it, too
    return found


@dataclass
class Bench:
    """What a measurement works with, and a note of the models that it used.

    Attributes
    ----------
    data : {"epfl", "phantom"}
        What is measured on.
    trained_on : str
        What the runs must say that they were trained on.
    folder : Path
        Of the recorded runs.
    name : str
        The recipe whose models are measured.
    after_each : callable
        Called after each prediction.
    used : dict
        What is to be written down of each model, by name and seed.
    """

    data: str
    trained_on: str
    folder: Path
    name: str = KEPT
    after_each: Callable[[], object] = lambda: None
    used: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The one that is measured."""
        return recipe_named(self.name)

    @property
    def choice(self) -> Choice:
        """How the folds chose to make a mask."""
        return first_choice(self.recipe, self.folder)

    @property
    def way(self) -> str:
        """How the folds chose to predict."""
        return "turned" if self.choice.turned else "plain"

    @property
    def seeds(self) -> list[int]:
        """Those of the recipe that have weights."""
        return [seed for seed in SEEDS if weights_path(self.name, seed, self.folder).is_file()] or [SEEDS[0]]

    def stack(self, part: str, *, data: str | None = None) -> Stack:
        """Return the labelled stack ``"train"`` or ``"test"``, by default of the data that is measured on."""
        return _stack(data or self.data, part)

    def trained(self, name: str, seed: int, *, on_phantom: bool = False) -> Trained:
        """Return a run's weights, or raise a ValueError that names the command that makes them."""
        folder = self.folder / "phantom" if on_phantom else self.folder
        path, record = weights_path(name, seed, folder), run_path(name, seed, folder)
        if not (path.is_file() and hash_path(path).is_file() and record.is_file()):
            data = " --data phantom" if on_phantom or self.data == "phantom" else ""
            command = f"mitoseg run {name} --seed {seed}{data}{_output_option(folder)}"
            first = f"move {record.name} away, since a recorded run isn't made again, and " if record.is_file() else ""
            raise ValueError(
                f"{path.name} isn't there with its sha256 and its run, but the weights are needed; {first}make them "
                f"with `{command}`."
            )
        expected, found = "phantom" if on_phantom else self.trained_on, read_run(record).data["name"]
        if found != expected:
            raise ValueError(
                f"{record.name} is a run on {found}, but one on {expected} was expected; name another folder."
            )
        sha256 = hash_path(path).read_text().split()[0]
        self.used[name, seed] = {"name": name, "seed": seed, "trained_on": found, "weights_sha256": sha256}
        return Trained(path, sha256, "fp32" if recipe_named(name).precision == "fp32" else "auto")

    def metadata(self, trained: Trained) -> WeightsMetadata:
        """Return what a model's file says of it."""
        return read_metadata(trained.path)

    def predict(self, trained: Trained, image: NDArray[np.uint8], way: str) -> Probabilities:
        """Return a model's probabilities of an image, in one of the `WAYS`."""
        found = WAYS[way](_model(trained), image, precision=trained.precision)
        self.after_each()
        return found

    def on_test(self, trained: Trained, way: str) -> Probabilities:
        """Return a model's probabilities of the test stack; read-only, since they are shared."""
        found = _test_probabilities(trained, self.data, way)
        self.after_each()
        return found


def _output_option(folder: Path) -> str:
    """Return how the command line names a folder of results, if it has to."""
    inside = folder.resolve().is_relative_to(RESULTS)
    shown = Path("results") / folder.resolve().relative_to(RESULTS) if inside else folder
    return "" if shown == Path("results") else f" --output {shown}"
