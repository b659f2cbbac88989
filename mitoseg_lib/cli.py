"""The command ``mitoseg``."""

import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Segment mitochondria in electron-microscopy stacks.", no_args_is_help=True, add_completion=False
)


class Dataset(StrEnum):
    """What can be fetched."""

    EPFL = "epfl"


class Data(StrEnum):
    """What a recipe can be run on."""

    EPFL = "epfl"
    PHANTOM = "phantom"


class Device(StrEnum):
    """Where a model can run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@app.callback()
def main() -> None:
    """Segment mitochondria in electron-microscopy stacks."""


@app.command()
def fetch(dataset: Annotated[Dataset, typer.Argument(help="Which data set.")]) -> None:
    """Download a data set once, check it, and say where it lies.

    Example: mitoseg fetch epfl
    """
    from mitoseg_lib.datasets import fetch_epfl
    from mitoseg_lib.stacks import StackError

    try:
        folder = fetch_epfl()
    except (StackError, OSError) as error:
        typer.echo(f"mitoseg: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"The {dataset.value} stacks are in {folder}")


@app.command()
def run(
    name: Annotated[str | None, typer.Argument(help="Which recipe.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn at random.")] = 0,
    data: Annotated[Data, typer.Option(help="The EPFL stacks, or the bundled synthetic ones.")] = Data.EPFL,
    output: Annotated[Path, typer.Option(help="Folder of the recorded runs.")] = Path("results"),
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
    list_names: Annotated[bool, typer.Option("--list", help="List the recipes, and stop.")] = False,
) -> None:
    """Make a recorded run: train by a recipe, measure, and write OUTPUT/NAME-seedS.json.

    Stopped by Ctrl-C or a time limit, it goes on from there when it is called again.

    Examples: mitoseg run --list
    mitoseg run check --data phantom
    mitoseg run unet --seed 1
    """
    from mitoseg_lib.recipes import RECIPES
    from mitoseg_lib.recording import record
    from mitoseg_lib.stacks import StackError

    if list_names:
        for recipe_name, recipe in RECIPES.items():
            typer.echo(f"{recipe_name:44s}{recipe.shows}")
        return
    if name is None:
        raise typer.BadParameter("no recipe was named; `mitoseg run --list` lists them.")
    if threads:
        import torch

        torch.set_num_threads(threads)
    try:
        made = record(name, seed, data=data.value, folder=output, progress=True)
    except (StackError, ValueError, RuntimeError, ArithmeticError, OSError) as error:
        typer.echo(f"mitoseg: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stopped:
        typer.echo(f"mitoseg: {stopped}", err=True)
        raise typer.Exit(130) from None
    measured = {"train": made.train, "validation": made.validation, "test": made.test}
    ious = ", ".join(f"{part} {found['iou']:.3f}" for part, found in measured.items() if found)
    typer.echo(f"{name}, seed {seed}: IoU {ious}, at threshold {made.threshold:g}")


def _voxel_size(text: str | None) -> tuple[float, float, float] | None:
    """Return z,y,x in nm; a usage error for anything else."""
    if text is None:
        return None
    try:
        z, y, x = (float(edge) for edge in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} isn't three lengths in nm; write z,y,x, for example 5,5,5.") from None
    if not all(0 < edge < float("inf") for edge in (z, y, x)):
        raise typer.BadParameter(f"{text!r} isn't three lengths above 0 in nm; write z,y,x, for example 5,5,5.")
    return z, y, x


@app.command()
def predict(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="TIFF stack, folder of slices, or (OME-)Zarr.")],
    output: Annotated[Path, typer.Argument(help="Its suffix is the format: .tif or .zarr.")],
    weights: Annotated[Path | None, typer.Option(help="Of another model than the shipped one.")] = None,
    voxel_size: Annotated[
        str | None, typer.Option(metavar="Z,Y,X", help="Of INPUT, in nm; by default what INPUT states, else 5,5,5.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Probability from which a voxel is a mitochondrion.")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write probabilities, 0 to 254 for 0 to 1, and no mask.")
    ] = False,
    tta: Annotated[
        bool, typer.Option("--tta", help="Average over 8 orientations: better, and 8 times slower.")
    ] = False,
    device: Annotated[Device, typer.Option(help="A GPU if there is one, or what is asked for.")] = Device.AUTO,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
) -> None:
    """Find the mitochondria in a stack, slice by slice, and write a mask of the same size.

    INPUT holds grey levels of uint8, uint16 or float, of any size. A TIFF mask is 0 and 255, an OME-Zarr mask 0 and 1.

    Examples: mitoseg predict stack.tif mask.tif
    mitoseg predict slices/ mask.zarr --voxel-size 8,4,4
    mitoseg predict stack.zarr probabilities.tif --probabilities --tta
    """
    if probabilities and threshold is not None:
        raise typer.BadParameter("--threshold makes a mask and --probabilities doesn't; choose one of them.")
    size = _voxel_size(voxel_size)
    from mitoseg_lib.prediction import Segmenter, plan_prediction

    # A time limit's signal would end the process at once; as an exception, it lets what was written be removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        segmenter = Segmenter.load(weights, device=device.value, threshold=threshold, tta=tta)
        plan = plan_prediction(source, output, segmenter, voxel_size_nm=size, overwrite=overwrite)
        for note in plan.notes:
            typer.echo(f"mitoseg: {note}", err=True)
        plan.run(probabilities=probabilities, progress=True)
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f"mitoseg: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"mitoseg: stopped, and nothing was written to {output}", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{'probabilities' if probabilities else 'mask'} written to {output}")


if __name__ == "__main__":
    app()
