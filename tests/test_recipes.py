"""Every recipe can be made, and draws what it says."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from small_recording import coded_stack

from mitoseg_lib import recipes
from mitoseg_lib.models import count_parameters
from mitoseg_lib.recipes import RECIPES, Recipe
from mitoseg_lib.splits import block_split
from mitoseg_lib.training import TrainingSettings
from mitoseg_lib.training.precision import mixed_precision

QUICKEST = RECIPES["check"]

each_recipe = pytest.mark.parametrize("name", RECIPES)
pytestmark = pytest.mark.usefixtures("one_thread")


def wanting(**changes):
    """The quickest recipe, with changes."""
    return dataclasses.replace(QUICKEST, **changes)


def test_names_are_unique_and_fit_for_files_and_the_command_line():
    groups = [value for name, value in vars(recipes).items() if getattr(value, "__annotations__", {}).get("return")]
    groups = [group for group in groups if group.__annotations__["return"] == dict[str, Recipe]]
    assert len(groups) >= 7
    names = list(itertools.chain.from_iterable(group() for group in groups))
    assert len(names) == len(RECIPES) == len({name.lower() for name in names}), "a later group hides a name"
    for name in RECIPES:
        assert re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", name) and len(name) <= 43  # the column of `--list`
        assert "-seed" not in name  # what follows it in a file's name is the seed


@each_recipe
def test_a_recipe_says_what_it_shows_and_whether_it_wants_a_gpu(name):
    recipe = RECIPES[name]
    assert 1 < len(recipe.shows) < 60 and "\n" not in recipe.shows
    is_long = name.startswith(("ladder-longer", "ladder-sturdy", "ladder-volume"))
    assert (name.endswith("-gpu") or is_long) == (recipe.precision == "auto")
    fastest = mixed_precision(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert recipe.settings(seed=0).precision == (fastest if recipe.precision == "auto" else recipe.precision)


def test_no_two_recipes_of_a_group_show_the_same():
    prefixes = ("mistake", "unet-", "unet3d", "lite0", "labels")
    for prefix in prefixes:
        shown = [r.shows for name, r in RECIPES.items() if name.startswith(prefix) and not name.endswith("-gpu")]
        assert len(shown) == len(set(shown)) > 3


@pytest.fixture(scope="module")
def models():
    """The model of each recipe; equal ones are built once."""
    built = {}

    def build(recipe):
        key = repr([recipe.unet, recipe.encoder, recipe.encoder_weights, recipe.frozen, recipe.mistake])
        if key not in built:
            built[key] = recipe.build(0)
        return built[key]

    return build


@each_recipe
def test_a_recipe_can_be_made(name, models, monkeypatch, tmp_path):
    recipe = RECIPES[name]
    assert isinstance(recipe.settings(3), TrainingSettings) and recipe.settings(3).seed == 3
    patches = recipe.patches(coded_stack(), 3)
    image, mask = patches[0]
    side = recipe.patch_size
    sides = (side, side) if isinstance(side, int) else side
    assert image.shape == (3 if recipe.neighbours else 1, *sides) and mask.shape == (1, *sides)
    assert len(patches) == recipe.steps * recipe.batch_size
    loss = recipe.settings(0).loss(torch.zeros(1, *mask.shape), mask[None])
    assert loss.shape == () and loss.isfinite()
    if recipe.encoder == "resnet34" and recipe.encoder_weights == "imagenet":
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(RuntimeError, match="ImageNet weights"):
            models(recipe)
        return
    model = models(recipe)
    assert model.ndim == len(sides)
    assert all(side % model.size_multiple == 0 for side in sides)
    assert 0 < count_parameters(model, trainable=True) <= count_parameters(model)
    assert (count_parameters(model, trainable=True) < count_parameters(model)) == recipe.frozen


@each_recipe
@pytest.mark.parametrize("n_slices", [60, 165])  # the bundled stacks, and EPFL's
def test_no_slice_both_trains_and_validates(name, n_slices):
    recipe = RECIPES[name]
    split = recipe.parts(n_slices)
    assert not set(split.train) & set(split.validation)
    assert set(split.train) | set(split.validation) <= set(range(n_slices))
    assert list(split.train) == sorted(set(split.train)) and split.validation
    if recipe.split == "block":
        assert split.validation == block_split(n_slices).validation
        assert split.train[-1] < split.validation[0] - 10


@pytest.mark.parametrize("start", ["imagenet", "random"])
def test_labelled_slices_are_spread_evenly(start):
    found = {n: RECIPES[f"labels-{n}-{start}"].parts(165).train for n in (1, 4, 16, 64, "all")}
    assert found[1] == (64,)  # the middle of 130
    assert found[4] == (0, 43, 86, 129)
    for n in (4, 16, 64):
        steps = np.diff(found[n])
        assert len(found[n]) == n and (found[n][0], found[n][-1]) == (0, 129)
        assert steps.max() - steps.min() <= 1
    assert found["all"] == tuple(range(130))
    assert RECIPES[f"labels-64-{start}"].parts(60).train == tuple(range(41))  # there are no more


def test_with_and_without_pretraining_few_labels_differ_in_nothing_else():
    for n in (1, 4, 16, 64, "all"):
        pretrained, random = (RECIPES[f"labels-{n}-{start}"] for start in ("imagenet", "random"))
        assert dataclasses.replace(pretrained, shows="", encoder_weights=None) == dataclasses.replace(random, shows="")


def test_the_seed_draws_weights_and_patches():
    recipe = RECIPES["check"]
    weights = [torch.cat([p.detach().flatten() for p in recipe.build(seed).parameters()]) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    first = [recipe.patches(coded_stack(), seed)[0][0] for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def epochs_of(patches):
    """All images of the first two epochs, as a training takes them."""
    for epoch in (0, 1):
        if hasattr(patches, "set_epoch"):
            patches.set_epoch(epoch)
        yield torch.stack([patches[i][0] for i in range(len(patches))])


def test_fixed_patches_are_the_same_few_in_each_epoch():
    first, second = epochs_of(wanting(fixed=3).patches(coded_stack(), 0))
    assert torch.equal(first, second) and len(first) == 8
    assert len(first.unique(dim=0)) == 3 and torch.equal(first[:3], first[3:6])
    fresh, later = epochs_of(QUICKEST.patches(coded_stack(), 0))
    assert len(torch.cat([fresh, later]).unique(dim=0)) == 16


def test_a_network_with_neighbours_is_shown_three_slices_and_the_mask_of_the_middle_one():
    recipe = dataclasses.replace(RECIPES["ladder-neighbours"], patch_size=32, steps=3)
    stack = coded_stack()
    stack.image[:] = np.arange(len(stack.image), dtype=np.uint8)[:, None, None]
    stack.labels[:] = (np.arange(len(stack.image)) % 2 == 0)[:, None, None]
    patches = recipe.patches(stack, 0)
    for image, mask in patches:
        below, middle, above = (image * 255).round()[:, 0, 0].int().tolist()
        assert (middle - below, above - middle) == (1, 1)
        assert mask.shape == (1, 32, 32) and bool(mask[0, 0, 0]) == (middle % 2 == 0)
    before = torch.stack([image for image, _ in patches])
    patches.set_epoch(1)
    assert not torch.equal(before, torch.stack([image for image, _ in patches]))
