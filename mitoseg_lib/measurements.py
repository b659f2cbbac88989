"""What is measured of models that recorded runs have trained: one file ``results/NAME.json`` for each measurement.

All of them load the weights that `mitoseg_lib.recording` keeps, and make masks as the run's folds chose. Nothing is
chosen here; where the best of several values on the test stack is shown, its name says so.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from tqdm.auto import tqdm

from mitoseg_lib.calibration import reliability
from mitoseg_lib.choices import Choice, best_choice, scores_of_choices
from mitoseg_lib.error_kinds import KINDS, errors_by_kind
from mitoseg_lib.files import write_whole
from mitoseg_lib.grey import grey_range, to_grey_range
from mitoseg_lib.inference import median_filter_z, threshold_scores
from mitoseg_lib.instances import label_instances, match_objects
from mitoseg_lib.ladder import read_rung
from mitoseg_lib.metrics import Scores, scores
from mitoseg_lib.recipes import N_FOLDS, recipe_named
from mitoseg_lib.recording import describe_data, device_name
from mitoseg_lib.robustness import CHANGES, curve
from mitoseg_lib.runs import RESULTS
from mitoseg_lib.splits import Split
from mitoseg_lib.stacks import Stack
from mitoseg_lib.surfaces import boundary_iou
from mitoseg_lib.trained import KEPT, STURDY, Bench, Probabilities

__all__ = [
    "KEPT",
    "MEASUREMENTS",
    "Measured",
    "Measurement",
    "measure",
    "measurement_path",
    "read_measurement",
]

FROM_PHANTOM = "lite0-imagenet-finetuned"  # the recipe that is trained on the phantom, too, in a folder of its own
OF_GREY_LEVELS = ("brightness", "contrast", "noise", "blur")  # changes that leave all voxels where they are
SINGLE = "ladder-careful"  # the recipe that is best on the folds among those that see single slices
VIEWS = ("plain", "turned", "views")
BLOCKS, BLOCK_SLICES = 3, 11  # of the test stack, for robustness: a fifth of it, with neighbours

Figures = dict[str, Any]
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Measured:
    """A measurement that was made: one file ``results/NAME.json``.

    Attributes
    ----------
    name, command, library_version, date, device, data
        As in `mitoseg_lib.runs.RecordedRun`; the data is what was measured on.
    models : list of dict
        ``name`` and ``seed`` of each run whose weights were used, what it was ``trained_on``, and ``weights_sha256``.
    figures : dict
        What was found; what is in it depends on the measurement.
    """

    name: str
    command: str
    library_version: str
    date: str
    device: str
    data: dict[str, Any]
    models: list[dict[str, Any]]
    figures: Figures


def measurement_path(name: str, folder: Path = RESULTS) -> Path:
    """Return where a measurement is written, whether it is there or not."""
    return folder / f"{name}.json"


def read_measurement(name: str, folder: Path = RESULTS) -> Measured | None:
    """Return a measurement, or None where it wasn't made yet.

    Raises
    ------
    ValueError
        When there is no such measurement, or its file isn't one that `measure` wrote.
    """
    _named(name)
    path = measurement_path(name, folder)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON ({error}): remove it and measure again.") from None
    expected = {field.name for field in dataclasses.fields(Measured)}
    found = set(content) if isinstance(content, dict) else set()
    if found != expected:
        odd = ", ".join(sorted(found ^ expected))
        raise ValueError(f"{path.name} lacks, or has beyond its format, the keys {odd}: remove it and measure again.")
    return Measured(**content)


def measure(name: str, *, data: str = "epfl", folder: Path = RESULTS, progress: bool | None = None) -> Measured:
    """Make a measurement, write its file, and return it; one that is there already is read instead.

    The last predictions of whole stacks are kept in memory (2 GB for EPFL), so several measurements in one process
    share them.

    Parameters
    ----------
    name : str
        One of `MEASUREMENTS`.
    data : {"epfl", "phantom"}
        What the models were trained and are measured on (of the two that transfer, one of both).
    folder : Path
        Where ``NAME.json`` is written; the runs' files are there, and their weights in ``weights/`` below it.
    progress : bool, optional
        Show how many predictions were made; by default on a terminal.

    Returns
    -------
    Measured

    Raises
    ------
    ValueError
        When there is no such measurement, weights are missing (the sentence names the command that makes them), or
        the folder holds the measurement of other data.
    StackError
        When the data can't be had.
    """
    measurement, command = _named(name), f"mitoseg run {name}" + (" --data phantom" if data == "phantom" else "")
    trained_on = describe_data(data)
    described = describe_data("phantom") if measurement.on_phantom else trained_on
    found, path = read_measurement(name, folder), measurement_path(name, folder)
    if found is not None:
        if (found.command, found.data["name"]) != (command, described["name"]):
            raise ValueError(
                f"{path.name} was made by `{found.command}` on {found.data['name']}, but `{command}` on "
                f"{described['name']} was asked for; name another folder for it."
            )
        return found
    bench = Bench(data, trained_on["name"], folder, measurement.of)
    with tqdm(desc=name, unit=" predictions", disable=None if progress is None else not progress) as bar:
        bench.after_each = bar.update
        figures = measurement.function(bench)
    made = Measured(
        name=name,
        command=command,
        library_version=metadata.version("mitoseg-lib"),
        date=datetime.now(UTC).date().isoformat(),
        device=device_name(),
        data=described,
        models=list(bench.used.values()),
        figures=figures,
    )
    write_whole(path, (json.dumps(dataclasses.asdict(made), indent=1, allow_nan=False) + "\n").encode())
    return made


# --- the measurements


def _robustness(bench: Bench) -> Figures:
    """Every change at every strength, on some blocks of the test stack; grey levels as they come."""
    return _under_changes(bench, CHANGES, lambda image: image)


def _grey_levels(bench: Bench) -> Figures:
    """The changes of grey levels, which are brought back to the model's as `mitoseg predict` does."""
    seen = bench.metadata(bench.trained(bench.name, 0)).grey_range
    return _under_changes(bench, OF_GREY_LEVELS, lambda image: to_grey_range(grey_range(image), seen).apply(image))


def _under_changes(bench: Bench, names: Iterable[str], bring_back: Callable[[Image], Image]) -> Figures:
    """Scores of a model under some changes, on blocks of the test stack."""
    trained, choice, way = bench.trained(bench.name, 0), bench.choice, bench.way
    test = bench.stack("test")
    blocks = _blocks(len(test.image))
    some = test.slices([z for block in blocks for z in block])

    def predict(image: Image) -> NDArray[np.bool_]:
        image = bring_back(image)
        parts = image.reshape(len(blocks), -1, *image.shape[1:])  # no block is a neighbour of another
        return np.concatenate([_mask(bench.predict(trained, part, way), choice) for part in parts])

    return {
        "choice": dataclasses.asdict(choice),
        "slices": [[block[0], block[-1]] for block in blocks],
        "n_slices": len(some.image),
        "n_slices_of_stack": len(test.image),
        "changes": {
            name: {
                "title": CHANGES[name].title,
                "unit": CHANGES[name].unit,
                "unchanged": CHANGES[name].unchanged,
                "curve": [
                    {"strength": strength} | _ratios(found) for strength, found in curve(predict, some, CHANGES[name])
                ],
            }
            for name in names
        },
    }


def _test_tuning(bench: Bench) -> Figures:
    """What threshold and median look like when they are chosen on the test stack, which they must not be."""
    choice, truth, rows = bench.choice, bench.stack("test").require_labels(), []
    for seed in bench.seeds:
        probabilities = bench.on_test(bench.trained(bench.name, seed), bench.way)
        found = scores_of_choices(probabilities, truth, turned=choice.turned)
        best = best_choice(found)
        ious = {"iou": found[choice].iou, "iou_chosen_on_test": found[best].iou}
        gap = ious["iou_chosen_on_test"] - ious["iou"]
        rows.append({"seed": seed} | ious | {"gap": gap, "choice_on_test": dataclasses.asdict(best)})
    mean = float(np.mean([row["iou"] for row in rows]))
    return {
        "choice": dataclasses.asdict(choice),
        "seeds": rows,
        "mean_iou": mean,
        "mean_gap": float(np.mean([row["gap"] for row in rows])),
        "gap_of_best_seed_on_test": max(row["iou"] for row in rows) - mean,
        "gap_of_best_seed_and_choice_on_test": max(row["iou_chosen_on_test"] for row in rows) - mean,
    }


def _calibration(bench: Bench) -> Figures:
    """Reliability of one seed, of the mean over seeds where there are several, and over eight turns; no median."""
    truth, seeds = bench.stack("test").require_labels(), bench.seeds
    trained = [bench.trained(bench.name, seed) for seed in seeds]
    plain = [bench.on_test(one, "plain") for one in trained]
    rows = {"one seed": (seeds[:1], plain[0])}
    if len(seeds) > 1:
        rows["mean over seeds"] = (seeds, _mean(plain))
    rows["mean over 8 turns"] = (seeds[:1], bench.on_test(trained[0], "turned"))
    return {"rows": [{"way": name, "seeds": of} | _bins(found, truth) for name, (of, found) in rows.items()]}


def _seeds(bench: Bench) -> Figures:
    """Each seed and their ensemble, and how far they differ."""
    found = _in_ways(bench, ["plain"])
    each = [bench.on_test(bench.trained(bench.name, seed), "plain") for seed in bench.seeds]
    return found | {"spread": _spread(each, bench.choice.threshold)}


def _views(bench: Bench) -> Figures:
    """Each way to predict."""
    return _in_ways(bench, VIEWS)


def _in_ways(bench: Bench, ways: Sequence[str]) -> Figures:
    """Some ways to predict, of each seed and of their ensemble; at each threshold, since a way may want its own."""
    choice, truth, rows = bench.choice, bench.stack("test").require_labels(), []
    trained = [bench.trained(bench.name, seed) for seed in bench.seeds]
    for way in ways:
        found = [bench.on_test(one, way) for one in trained]
        for median in sorted({1, choice.median}):
            over_seeds = _over_seeds(found, truth, Choice(False, median, choice.threshold))
            rows.append({"predicted": way, "median": median} | over_seeds)
    return {"choice": dataclasses.asdict(choice), "seeds": bench.seeds, "rows": rows}


def _error_kinds(bench: Bench) -> Figures:
    """How many objects and voxels are wrong in which way, and what the IoU would be without them."""
    choice, seed = bench.choice, bench.seeds[0]
    mask = _mask(bench.on_test(bench.trained(bench.name, seed), bench.way), choice)
    found = errors_by_kind(mask, bench.stack("test").require_labels())
    rows = [
        {
            "kind": kind,
            "objects": found.objects[kind],
            "added": found.added[kind],
            "lacking": found.lacking[kind],
            "iou_without": found.iou_without(kind),
        }
        for kind in KINDS
    ]
    return {"choice": dataclasses.asdict(choice), "seed": seed, "iou": found.iou, "rows": rows}


def _boundary(bench: Bench) -> Figures:
    """How much of the error lies at boundaries, and what one pixel of boundary costs."""
    truth, choice, seed = bench.stack("test").require_labels(), bench.choice, bench.seeds[0]
    mask = _mask(bench.on_test(bench.trained(bench.name, seed), bench.way), choice)
    objects = match_objects(label_instances(mask), label_instances(truth))
    square = np.ones((1, 3, 3), bool)  # rows and columns, as in boundary_iou
    grown = ndimage.binary_dilation(truth, square)
    shrunk = ndimage.binary_erosion(truth, square, border_value=1)  # the edge of the image is no boundary
    return {
        "choice": dataclasses.asdict(choice),
        "seed": seed,
        "iou_by_band": [{"width": width, "iou": boundary_iou(mask, truth, width)} for width in range(4)],
        "objects": {
            "precision": objects.precision,
            "recall": objects.recall,
            "n_predicted": objects.n_predicted,
            "n_true": objects.n_true,
            "n_matched": len(objects.pairs),
        },
        "iou_of_truth_dilated_by_1": scores(grown, truth).iou,
        "iou_of_truth_eroded_by_1": scores(shrunk, truth).iou,
    }


def _views_on_folds(bench: Bench) -> Figures:
    """Each way to predict on the slices that validate, pooled over the folds: where to choose one of them."""
    medians = sorted({1, bench.choice.median})
    found = _on_folds(bench, bench.name, VIEWS, medians)
    rows = [{"predicted": way, "median": median} | _over_folds(folds) for (way, median), folds in found.items()]
    return {"choice": dataclasses.asdict(bench.choice), "rows": rows}


def _on_folds(
    bench: Bench, recipe: str, ways: Sequence[str], medians: Sequence[int]
) -> dict[tuple[str, int], list[dict[float, Scores]]]:
    """Counts at each threshold, for each fold, of the slices that validate, by way to predict and median."""
    stack = bench.stack("train")
    found: dict[tuple[str, int], list[dict[float, Scores]]] = {(way, m): [] for way in ways for m in medians}
    for k in range(1, N_FOLDS + 1):
        name = f"{recipe}-fold-{k}"
        trained, split = bench.trained(name, 0), recipe_named(name).parts(len(stack.image))
        around = _around(split, len(stack.image))
        image, kept = stack.image[around], np.subtract(split.validation, around.start)
        truth = stack.require_labels()[list(split.validation)]
        for way in ways:
            probabilities = bench.predict(trained, image, way)[kept]
            for median in medians:
                found[way, median].append(threshold_scores(median_filter_z(probabilities, median), truth))
    return found


def _single_slices(bench: Bench) -> Figures:
    """Networks that know neighbours, given single slices, beside one that learned from these; no median.

    Each on its folds, with the threshold that is best there, and with that on the test stack; for comparison there
    with its neighbours, and the threshold that was chosen for them.
    """
    rows = []
    for name in (KEPT, STURDY):
        [folds] = _on_folds(bench, name, ["alone"], [1]).values()
        found = bench.on_test(bench.trained(name, 0), "plain") >= np.float32(bench.choice.threshold)
        with_neighbours = scores(found, bench.stack("test").require_labels()).iou
        rows.append({"name": name, "test_iou_with_neighbours": with_neighbours} | _over_folds(folds))
    rung = read_rung(SINGLE, bench.folder)
    if rung is None:
        names = f"{SINGLE}-fold-1 to -{N_FOLDS}"
        raise ValueError(f"the recorded runs {names}, seed 0, aren't all there, but are needed; make them first.")
    rows.append({"name": SINGLE, "threshold": rung.choice.threshold, "fold_ious": list(rung.ious)})
    test, truth = bench.stack("test").image, bench.stack("test").require_labels()
    for row in rows:
        found = bench.predict(bench.trained(row["name"], 0), test, "alone")
        row["test_iou"] = scores(found >= np.float32(row["threshold"]), truth).iou
    return {"rows": rows}


def _transfer_to_phantom(bench: Bench) -> Figures:
    """A model of tissue on the phantom."""
    stack = bench.stack("test", data="phantom")
    return _transferred(bench.predict(bench.trained(bench.name, 0), stack.image, "plain"), stack)


def _transfer_from_phantom(bench: Bench) -> Figures:
    """A model of the phantom on tissue."""
    trained = bench.trained(FROM_PHANTOM, 0, on_phantom=True)
    return _transferred(bench.on_test(trained, "plain"), bench.stack("test"))


@dataclass(frozen=True)
class Measurement:
    """Something that is measured of trained models.

    Attributes
    ----------
    shows : str
        What it is for, in a few words.
    function : callable
        Makes it.
    of : str
        The recipe whose models are measured.
    on_phantom : bool
        It is always measured on the phantom.
    """

    shows: str
    function: Callable[[Bench], Figures]
    of: str = KEPT
    on_phantom: bool = False


MEASUREMENTS: dict[str, Measurement] = {
    "robustness": Measurement("IoU under changes of the image", _robustness),
    "grey-levels": Measurement("the same, with grey levels brought back to the model's", _grey_levels),
    "robustness-sturdy": Measurement("robustness after strong augmentation", _robustness, of=STURDY),
    "grey-levels-sturdy": Measurement("that, with grey levels brought back", _grey_levels, of=STURDY),
    "test-tuning": Measurement("what it feigns to choose on the test stack", _test_tuning),
    "calibration": Measurement("whether probabilities mean what they say", _calibration),
    "seeds": Measurement("seeds and their ensemble", _seeds),
    "views": Measurement("eight turns, three views", _views),
    "views-on-folds": Measurement("turns and views where choices are made", _views_on_folds),
    "single-slices": Measurement("single slices in place of three", _single_slices),
    "boundary": Measurement("how much of the error lies at boundaries", _boundary),
    "error-kinds": Measurement("errors by kind", _error_kinds),
    "transfer-to-phantom": Measurement("from tissue to the phantom", _transfer_to_phantom, on_phantom=True),
    "transfer-from-phantom": Measurement("from the phantom to tissue", _transfer_from_phantom),
}


def _named(name: str) -> Measurement:
    """Return a measurement, or raise a ValueError with the names that are near."""
    if name in MEASUREMENTS:
        return MEASUREMENTS[name]
    near = get_close_matches(name, MEASUREMENTS, n=3, cutoff=0.4) or list(MEASUREMENTS)
    raise ValueError(
        f"There is no measurement {name!r}, but for example {', '.join(near)}; `mitoseg run --list` lists all."
    )


# --- figures


def _mask(probabilities: Probabilities, choice: Choice) -> NDArray[np.bool_]:
    return median_filter_z(probabilities, choice.median) >= choice.threshold


def _ratios(found: Scores) -> dict[str, float]:
    return {name: getattr(found, name) for name in ("iou", "dice", "precision", "recall")}


def _blocks(depth: int) -> list[range]:
    """Return blocks of neighbouring slices, one in the middle of each third of a stack."""
    n = min(BLOCKS, depth)
    size = min(BLOCK_SLICES, depth // n)
    starts = [((2 * k + 1) * depth // n - size) // 2 for k in range(n)]
    return [range(start, start + size) for start in starts]


def _around(split: Split, depth: int) -> slice:
    """Return the slices that validate and those around them that don't train.

    So the views from the side have surroundings, and none that the model was trained on.
    """
    start, stop = min(split.validation), max(split.validation) + 1
    while start > 0 and start - 1 not in split.train:
        start -= 1
    while stop < depth and stop not in split.train:
        stop += 1
    return slice(start, stop)


def _mean(volumes: Sequence[Probabilities]) -> Probabilities:
    """Return the mean of some predictions."""
    total = volumes[0].copy()
    for volume in volumes[1:]:
        total += volume
    total /= len(volumes)
    return total


def _sd(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, where there is one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _bins(probabilities: Probabilities, truth: NDArray[np.bool_]) -> Figures:
    """Return a reliability diagram's numbers; None in bins that are empty."""
    found = reliability(probabilities, truth)
    return {
        "expected_calibration_error": found.expected_calibration_error,
        "edges": found.edges.tolist(),
        "voxels": found.voxels.tolist(),
        "foreground": found.foreground.tolist(),
        "predicted": _without_nan(found.predicted),
        "observed": _without_nan(found.observed),
    }


def _without_nan(values: Iterable[float]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _over_seeds(each: Sequence[Probabilities], truth: NDArray[np.bool_], choice: Choice) -> Figures:
    """Return the IoU of each seed and of their mean, with a median, at each threshold and at the chosen one."""
    filtered = partial(median_filter_z, size=choice.median)
    seeds = [threshold_scores(filtered(one), truth) for one in each]
    ensemble = threshold_scores(filtered(_mean(each)), truth)
    by_threshold = [
        {"threshold": t, "seeds": [found[t].iou for found in seeds], "ensemble": ensemble[t].iou} for t in ensemble
    ]
    ious = [found[choice.threshold].iou for found in seeds]
    return {
        "threshold": choice.threshold,
        "ious": ious,
        "mean": float(np.mean(ious)),
        "sd": _sd(ious),
        "ensemble": ensemble[choice.threshold].iou,
        "by_threshold": by_threshold,
    }


def _over_folds(folds: Sequence[dict[float, Scores]]) -> Figures:
    """Return the pooled IoU at each threshold, and the best of them with each fold's own IoU there."""
    total = {Choice(threshold=t): sum((fold[t] for fold in folds), Scores(0, 0, 0, 0)) for t in folds[0]}
    best = best_choice(total)
    return {
        "threshold": best.threshold,
        "iou": total[best].iou,
        "fold_ious": [fold[best.threshold].iou for fold in folds],
        "by_threshold": [{"threshold": choice.threshold, "iou": found.iou} for choice, found in total.items()],
    }


def _spread(each: Sequence[Probabilities], threshold: float) -> Figures:
    """Return how far seeds differ where one of them or more sees a mitochondrion."""
    n_voxels, n_disputed, total = 0, 0, 0.0
    for slices in zip(*each, strict=True):
        stacked = np.stack(slices)
        votes = (stacked >= threshold).sum(axis=0)
        some = votes > 0
        n_voxels += int(some.sum())
        n_disputed += int((some & (votes < len(each))).sum())
        total += float(stacked.std(axis=0, ddof=1, dtype=np.float64)[some].sum()) if len(each) > 1 else 0.0
    is_known = len(each) > 1 and n_voxels > 0
    return {
        "voxels_that_a_seed_calls_foreground": n_voxels,
        "mean_sd_there": total / n_voxels if is_known else None,
        "share_disputed_there": n_disputed / n_voxels if is_known else None,
    }


def _transferred(probabilities: Probabilities, stack: Stack) -> Figures:
    """Return the IoU at 0.5, and the best that a threshold could reach if the truth were known."""
    found = threshold_scores(probabilities, stack.require_labels())
    best = best_choice({Choice(threshold=t): counts for t, counts in found.items()}).threshold
    return {
        "at_0.5": _ratios(found[0.5]),
        "upper_bound_with_threshold_chosen_on_test": {"threshold": best} | _ratios(found[best]),
        "by_threshold": [{"threshold": t, "iou": counts.iou} for t, counts in found.items()],
    }
