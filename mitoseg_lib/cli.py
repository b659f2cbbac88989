"""The command ``mitoseg``."""

from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(
    help="Segment mitochondria in electron-microscopy stacks.", no_args_is_help=True, add_completion=False
)


class Dataset(StrEnum):
    """What can be fetched."""

    EPFL = "epfl"


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


if __name__ == "__main__":
    app()
