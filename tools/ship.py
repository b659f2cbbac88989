"""Make a recorded run's model the one that comes with the library: ``python tools/ship.py NAME SEED``.

Its weights go to ``data/weights/`` with their sha256 and the rule that its folds chose, and its figures into the model
card there, so that nothing in the card is written by hand.
"""

import argparse
import re
from pathlib import Path

from mitoseg_lib.choices import Choice, best_choice, pooled, read_choices
from mitoseg_lib.files import write_whole
from mitoseg_lib.recipes import N_FOLDS, recipe_named
from mitoseg_lib.recording import weights_path
from mitoseg_lib.runs import RESULTS, RecordedRun, read_run, run_path
from mitoseg_lib.weights import SHIPPED, MaskRule, WeightsMetadata, load_weights, save_weights

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "data" / "weights"
LARGEST = 12_000_000  # bytes
BEGIN, END = "<!-- written by tools/ship.py -->", "<!-- end -->"


def chosen(run: RecordedRun, folder: Path) -> Choice:
    """How the run's probabilities become a mask, as its folds say; SystemExit if the run says otherwise."""
    base = recipe_named(run.name).chosen_on
    choice = Choice(threshold=run.threshold)
    if base is not None:
        choice = best_choice(pooled(read_choices(f"{base}-fold-{k}", 0, folder) for k in range(1, N_FOLDS + 1)))
    medians = [int(number) for number in re.findall(r"median over (\d+) slices", run.model)] or [1]
    turned = "8 turns" in run.model
    if (choice.turned, [choice.median], choice.threshold) != (turned, medians, run.threshold):
        raise SystemExit(f"The folds say {choice}, but the run {run.name} was measured otherwise; make it again.")
    if turned:
        raise SystemExit(f"{run.name} averages over 8 turns, but weights can't ask for that; ship another run.")
    return choice


def ship_weights(run: RecordedRun, choice: Choice, folder: Path, path: Path) -> WeightsMetadata:
    """Write the run's weights with a rule; SystemExit if the file is too large."""
    model, metadata = load_weights(weights_path(run.name, run.seed, folder))
    # Saved again, since weights that were kept before there were medians don't say theirs; 16 bits stay the same.
    written = save_weights(
        model,
        path,
        rule=MaskRule(choice.threshold, choice.median),
        encoder=metadata.encoder,
        voxel_size_nm=metadata.voxel_size_nm,
        grey_range=metadata.grey_range,
    )
    if path.stat().st_size > LARGEST:
        raise SystemExit(f"{path.name} is larger than {LARGEST} bytes; ship a smaller model.")
    return written


def figures(run: RecordedRun, metadata: WeightsMetadata) -> str:
    """The part of the model card that comes from the recorded run and the file."""
    low, high = metadata.grey_range or (0, 255)
    median = f"median over {metadata.median} slices along z, then " if metadata.median > 1 else ""
    rows = {
        "network": f"{run.model.split(';')[0]}; {run.parameters:,} parameters",
        "sees": "a slice and the ones above and below" if metadata.options.get("neighbours") else "single slices",
        "voxels": " x ".join(f"{edge:g}" for edge in metadata.voxel_size_nm) + " nm (z, y, x)",
        "grey levels": f"uint8, 0.1 and 99.9 % of the voxels at or below {low:g} and {high:g}",
        "from probabilities to a mask": f"{median}threshold {metadata.threshold:g}; chosen on validation slices",
        "trained on": f"{run.data['name']}, {run.split}",
        "training": f"{run.epochs} epochs, batches of {run.batch_size} patches of {run.patch_size} x {run.patch_size}; "
        f"{run.optimizer}; rate {run.learning_rate:g}; {run.loss}; {run.augmentation}",
        "made": f"{run.date}, in {run.wall_seconds / 60:.0f} minutes on {run.device}",
        "again": f"`{run.command}`",
    }
    parts = {"test stack": run.test, "training stack (some of its slices)": run.train}
    names = ("iou", "dice", "precision", "recall")
    lines = ["| | |", "|---|---|", *(f"| {what} | {words} |" for what, words in rows.items()), ""]
    lines += ["| | IoU | Dice | precision | recall |", "|---|---|---|---|---|"]
    lines += [f"| {part} | {' | '.join(f'{found[name]:.3f}' for name in names)} |" for part, found in parts.items()]
    return "\n".join(lines)


def fill(card: str, content: str) -> str:
    """The card with its figures replaced."""
    before, rest = card.split(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of a recorded run")
    parser.add_argument("seed", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of recorded runs and their weights")
    arguments = parser.parse_args()
    run, folder = read_run(run_path(arguments.name, arguments.seed, arguments.results)), arguments.results
    metadata = ship_weights(run, chosen(run, folder), folder, FOLDER / SHIPPED)
    card = FOLDER / "README.md"
    write_whole(card, fill(card.read_text(), figures(run, metadata)).encode())
    print(f"{FOLDER / SHIPPED}: {(FOLDER / SHIPPED).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
