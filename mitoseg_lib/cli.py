"""The command ``mitoseg``."""

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


if __name__ == "__main__":
    app()
