"""Check the shipped model on the whole EPFL test stack: ``python tools/check_shipped.py``; it takes minutes.

It does what a reader would, `mitoseg predict` and `mitoseg evaluate --json`, and compares the IoU with the recorded one
of the run that the model card names. The recorded one was measured with the network's 32-bit weights as they were
trained, so this is also how much the file's 16-bit weights cost. What 16-bit convolutions (bf16) cost beyond that is
measured with the file's weights in both precisions.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import ship
from mitoseg_lib.datasets import fetch_epfl, load_epfl
from mitoseg_lib.inference import median_filter_z, predict_stack
from mitoseg_lib.metrics import iou
from mitoseg_lib.runs import RESULTS, RecordedRun, read_run, run_path
from mitoseg_lib.weights import load_weights

ALLOWED, ALLOWED_PRECISION = 0.002, 0.001


def shipped_run(folder: Path = RESULTS) -> RecordedRun:
    """The run that the model card names."""
    card = (ship.FOLDER / "README.md").read_text()
    name, seed = re.search(r"`mitoseg run (\S+) --seed (\d+)`", card).groups()
    return read_run(run_path(name, int(seed), folder))


def iou_by_command() -> float:
    """IoU of the test stack as the command line gives it."""
    mitoseg, stacks = Path(sys.executable).with_name("mitoseg"), fetch_epfl()
    with tempfile.TemporaryDirectory() as folder:
        mask = Path(folder) / "mask.tif"
        subprocess.run([mitoseg, "predict", stacks / "testing.tif", mask], check=True)
        truth = stacks / "testing_groundtruth.tif"
        done = subprocess.run([mitoseg, "evaluate", mask, truth, "--json"], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)["iou"]


def iou_in(precision: str, n_slices: int | None) -> float:
    """IoU of the first slices of the test stack, with the file's weights in fp32 or bf16."""
    model, metadata = load_weights()
    test = load_epfl("testing").slices(slice(n_slices))
    found = median_filter_z(predict_stack(model, test.image, precision=precision, progress=True), metadata.median)
    return iou(found >= metadata.threshold, test.require_labels())


def row(what: str, one: float, other: float, allowed: float) -> bool:
    """One line of the table; whether the two are near enough."""
    is_near = abs(one - other) <= allowed
    print(f"{what:52s}{one:.4f}  {other:.4f}  {'' if is_near else 'NOT '}within {allowed:g}", flush=True)
    return is_near


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, help="only compare precisions, on the first so many slices")
    parser.add_argument("--threads", type=int, help="CPU threads of that; all cores by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of recorded runs")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    near = []
    if arguments.slices is None:
        recorded = shipped_run(arguments.results).test["iou"]
        near.append(row("16-bit file by commands, 32-bit network as recorded", iou_by_command(), recorded, ALLOWED))
    full, half = (iou_in(precision, arguments.slices) for precision in ("fp32", "bf16"))
    if arguments.slices is None:
        near.append(row("16-bit file in fp32, 32-bit network as recorded", full, recorded, ALLOWED_PRECISION))
    near.append(row("16-bit file in fp32, and in bf16", full, half, ALLOWED_PRECISION))
    sys.exit(0 if all(near) else 1)


if __name__ == "__main__":
    main()
