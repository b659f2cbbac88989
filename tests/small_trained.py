"""A folder of recorded runs with small trained models, for tests of what is measured of them."""

import dataclasses
import itertools

from small_models import grey_unet, random_unet

from mitoseg_lib.choices import Choice, write_choices
from mitoseg_lib.datasets import describe_example
from mitoseg_lib.measurements import FROM_PHANTOM, SINGLE
from mitoseg_lib.metrics import Scores
from mitoseg_lib.recipes import recipe_named
from mitoseg_lib.recording import weights_path
from mitoseg_lib.runs import RESULTS, read_run
from mitoseg_lib.trained import KEPT, STURDY
from mitoseg_lib.weights import MaskRule, save_weights

CHOICE = Choice(median=3, threshold=0.4)  # what the folds' figures say below
SEEDS = (0, 2)
FOLDS_OF = {recipe_named(name).chosen_on for name in (KEPT, STURDY, SINGLE)}
LEVELS = {1: 80, 2: 100, 3: 110, 4: 130}  # of the folds' models: what is brighter is foreground


def write_run(folder, name, seed, model, data=None):
    """A run's file and its weights; what it says of its training is another's."""
    some = read_run(RESULTS / "unet-seed0.json")
    dataclasses.replace(some, name=name, seed=seed, data=data or describe_example(), test=None).write(folder)
    path = weights_path(name, seed, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model, path, rule=MaskRule(0.5))


def write_choice(folder, choice=CHOICE):
    for name, k in itertools.product(FOLDS_OF, LEVELS):
        found = {Choice(): Scores(5, 5, 0, 90), choice: Scores(9, 1, 0, 90)}
        write_choices(f"{name}-fold-{k}", 0, found, folder)


def write_runs(folder):
    """All that any measurement needs."""
    write_choice(folder)
    for name, seed in itertools.product((KEPT, STURDY), SEEDS):
        write_run(folder, name, seed, random_unet(seed + 10 * (name == STURDY)))
    write_run(folder, SINGLE, 0, random_unet(20))
    for name, (k, level) in itertools.product((KEPT, STURDY, SINGLE), LEVELS.items()):
        write_run(folder, f"{name}-fold-{k}", 0, grey_unet(level))
    write_run(folder / "phantom", FROM_PHANTOM, 0, grey_unet(100))
    return folder
