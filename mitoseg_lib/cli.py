"""The command ``mitoseg``."""

import math
import shlex
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mitoseg_lib.volumes import Verification, VolumePlan

app = typer.Typer(
    help="Segment mitochondria in electron-microscopy stacks.", no_args_is_help=True, add_completion=False
)


class Dataset(StrEnum):
    """What can be fetched."""

    EPFL = "epfl"
    LUCCHI_PLUS = "lucchi++"


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

    lucchi++ are other labels of the EPFL stacks, drawn anew by Casser et al. (2020).

    Examples: mitoseg fetch epfl
    mitoseg fetch lucchi++
    """
    from mitoseg_lib.datasets import fetch_epfl, fetch_lucchi_plus
    from mitoseg_lib.stacks import StackError

    try:
        place = fetch_epfl() if dataset is Dataset.EPFL else fetch_lucchi_plus()
    except (StackError, OSError) as error:
        typer.echo(f"mitoseg: {error}", err=True)
        raise typer.Exit(1) from None
    what = "stacks" if dataset is Dataset.EPFL else "labels"
    typer.echo(f"The {dataset.value} {what} are in {place}")


@app.command()
def run(
    name: Annotated[str | None, typer.Argument(help="Which recipe or measurement.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn at random.")] = 0,
    data: Annotated[Data, typer.Option(help="The EPFL stacks, or the bundled synthetic ones.")] = Data.EPFL,
    output: Annotated[Path, typer.Option(help="Folder of the recorded runs.")] = Path("results"),
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
    list_names: Annotated[bool, typer.Option("--list", help="List recipes and measurements, and stop.")] = False,
) -> None:
    """Make a recorded run: train by a recipe, measure, and write OUTPUT/NAME-seedS.json.

    Stopped by Ctrl-C or a time limit, it goes on from there when it is called again.

    The last names of the list are measurements of models that such runs have trained: their weights are read from
    OUTPUT/weights, and OUTPUT/NAME.json is written, whole or not at all.

    Examples: mitoseg run --list
    mitoseg run check --data phantom
    mitoseg run unet --seed 1
    mitoseg run robustness
    """
    from mitoseg_lib.measurements import MEASUREMENTS
    from mitoseg_lib.recipes import RECIPES
    from mitoseg_lib.stacks import StackError

    if list_names:
        for listed, entry in (RECIPES | MEASUREMENTS).items():
            typer.echo(f"{listed:44s}{entry.shows}")
        return
    if name is None:
        raise typer.BadParameter("no recipe was named; `mitoseg run --list` lists them.")
    if name in MEASUREMENTS and seed:
        raise typer.BadParameter("a measurement takes the seeds that have weights; leave out --seed.")
    _prepare_training(threads)
    try:
        made = _measure(name, data, output) if name in MEASUREMENTS else _record(name, seed, data, output)
    except (StackError, ValueError, RuntimeError, ArithmeticError, OSError) as error:
        typer.echo(f"mitoseg: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stopped:
        typer.echo(f"mitoseg: {str(stopped) or 'stopped, and nothing was written.'}", err=True)
        raise typer.Exit(130) from None
    typer.echo(made)


def _prepare_training(threads: int | None) -> None:
    """Keep freed memory, and use so many CPU threads."""
    from mitoseg_lib.memory import reuse_memory

    reuse_memory()
    if threads:
        import torch

        torch.set_num_threads(threads)


def _record(name: str, seed: int, data: Data, output: Path) -> str:
    """Make a recorded run, and return what there is to say of it."""
    from mitoseg_lib.recording import record

    made = record(name, seed, data=data.value, folder=output, progress=True)
    measured = {"train": made.train, "validation": made.validation, "test": made.test}
    ious = ", ".join(f"{part} {found['iou']:.3f}" for part, found in measured.items() if found)
    return f"{name}, seed {seed}: IoU {ious}, at threshold {made.threshold:g}"


def _measure(name: str, data: Data, output: Path) -> str:
    """Make a measurement, and return where it is."""
    from mitoseg_lib.measurements import measure, measurement_path

    made = measure(name, data=data.value, folder=output, progress=True)
    models = ", ".join(f"{model['name']}, seed {model['seed']}" for model in made.models)
    return f"{name} is measured in {measurement_path(name, output)}, of {models}"


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
    size = None if voxel_size is None else _voxel_size(voxel_size)
    from mitoseg_lib.memory import reuse_memory
    from mitoseg_lib.prediction import Segmenter, plan_prediction

    reuse_memory()
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


@app.command()
def volume(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="(OME-)Zarr, TIFF stack, or folder of slices.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT.zarr", help="OME-Zarr to write.")],
    weights: Annotated[Path | None, typer.Option(help="Of another model than the shipped one.")] = None,
    voxel_size: Annotated[
        str | None, typer.Option(metavar="Z,Y,X", help="Of INPUT, in nm; needed where INPUT doesn't state it.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Probability from which a voxel is a mitochondrion.")
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Keep them, too.")] = False,
    min_volume: Annotated[float, typer.Option(metavar="UM3", min=0, help="Leave out objects under so many µm³.")] = 0.0,
    split: Annotated[bool, typer.Option("--split", help="Separate objects that hang together by a neck.")] = False,
    tta: Annotated[bool, typer.Option("--tta", help="Average over 8 orientations: 8 times slower.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default as many as cores and memory allow.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each worker.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="Of a Dask cluster that runs already.")
    ] = None,
    device: Annotated[Device, typer.Option(help="A GPU if there is one, or what is asked for.")] = Device.AUTO,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT, or begin it anew.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="When it is finished, compare every chunk with its checksum.")
    ] = False,
) -> None:
    """Segment a volume of any size on many workers, and number and measure its mitochondria.

    OUTPUT.zarr holds the mask, the numbered mitochondria (labels/mitochondria), both at several resolutions, and
    measurements.csv with a row for each.

    Stopped in whatever way, the same command goes on, and ends with the same bytes. A finished OUTPUT is left as it is.

    Exit codes: 0, all done; 1, a mistake or an error; 3, some slabs couldn't be done; 130, stopped.

    Examples: mitoseg volume stack.tif mitochondria.zarr --voxel-size 5,5,5
    mitoseg volume slices/ mitochondria.zarr --voxel-size 8,4,4 --min-volume 0.002 --split
    mitoseg volume volume.zarr mitochondria.zarr --scheduler tcp://10.0.0.1:8786
    """
    if scheduler and workers:
        raise typer.BadParameter("--workers starts some and --scheduler uses those that run; choose one of them.")
    size = None if voxel_size is None else _voxel_size(voxel_size)
    from mitoseg_lib.volumes import VolumeError, VolumeOptions, plan_volume, verify_volume

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = VolumeOptions(
        weights, size, threshold, tta, probabilities, min_volume, split, device=device.value, threads=threads
    )
    try:
        plan = plan_volume(source, output, options, overwrite=overwrite, progress=True)
        if plan.is_finished:
            typer.echo(f"mitoseg: {output} is finished already, and nothing was changed", err=True)
            found = plan.run(None)
        else:
            found = _segment(plan, scheduler, workers)
        checked = verify_volume(output, progress=True) if verify else None
    except VolumeError as error:
        typer.echo(f"mitoseg: {error}", err=True)
        raise typer.Exit(3) from None
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f"mitoseg: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("mitoseg: stopped; the same command goes on from there.", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{found['objects']} mitochondria in {output}, measured in {output / 'measurements.csv'}")
    if checked is not None:
        _report(checked)


def _segment(plan: "VolumePlan", scheduler: str | None, workers: int | None) -> dict:
    """Segment a volume on the cluster that was asked for, and return what the result says of itself."""
    from mitoseg_lib.volumes import connected_cluster, local_cluster

    for note in plan.notes:
        typer.echo(f"mitoseg: {note}", err=True)
    if scheduler:
        cluster = connected_cluster(scheduler)
    else:
        cluster = local_cluster(workers, plane=plan.job.shape[1:], device=plan.job.device)
    with cluster as client:
        n = len(client.nthreads())
        typer.echo(f"mitoseg: {n} worker{'s' if n != 1 else ''}; dashboard at {client.dashboard_link}", err=True)
        return plan.run(client, progress=True)


def _report(checked: "Verification") -> None:
    """Say what a verification found; exit with 1 if anything."""
    for fault in checked.faults:
        typer.echo(f"mitoseg: {fault}", err=True)
    if checked.faults:
        typer.echo(f"mitoseg: {len(checked.faults)} faults; segment it again with --overwrite.", err=True)
        raise typer.Exit(1)
    typer.echo(f"{checked.n_chunks} chunks and the table are as they were written")


@app.command()
def train(
    image: Annotated[Path, typer.Argument(help="TIFF stack, folder of slices, or (OME-)Zarr.", show_default=False)],
    labels: Annotated[Path, typer.Argument(help="Its mask, of the same shape.", show_default=False)],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of this training.", show_default=False)],
    encoder: Annotated[
        str | None, typer.Option(help="Of segmentation-models-pytorch; by default that of the weights.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|imagenet", help="Where to start; by default the shipped model if it is there, else imagenet."
        ),
    ] = None,
    epochs: Annotated[
        int,
        typer.Option(
            min=1, help="Of 30 steps of 6 patches, whatever the size of the stack; 20 take 3 to 5 minutes on 2 cores."
        ),
    ] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn at random.")] = 0,
    voxel_size: Annotated[
        str | None, typer.Option(metavar="Z,Y,X", help="Of IMAGE, in nm; by default what IMAGE states, else 5,5,5.")
    ] = None,
    neighbours: Annotated[
        bool | None,
        typer.Option(
            "--neighbours/--no-neighbours",
            help="Whether the network sees the slices above and below; by default as in the weights, from imagenet"
            " if there are 3 slices. Not for slices from here and there.",
            show_default=False,
        ),
    ] = None,
    instances: Annotated[
        bool, typer.Option("--instances", help="LABELS number objects; without it they are a mask.")
    ] = False,
    device: Annotated[Device, typer.Option(help="A GPU if there is one, or what is asked for.")] = Device.AUTO,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted training in DIR.")] = False,
) -> None:
    """Train a model on your own labels, and measure it on a part of them that it hasn't seen.

    Every slice of LABELS must be labelled; ten of 512 x 512 pixels do for a start.

    Held out are the last slices, or a quarter of each slice if there are fewer than 20.

    Writes DIR/model.safetensors for `mitoseg predict --weights`, and DIR/history.csv.

    Stopped by Ctrl-C or a time limit, it goes on by --resume.

    Examples: mitoseg train slices.tif labels.tif --output trained
    mitoseg train slices/ labels/ --output trained2 --voxel-size 8,4,4 --epochs 60
    """
    size = None if voxel_size is None else _voxel_size(voxel_size)
    from mitoseg_lib.finetuning import FineTuningOptions, plan_finetuning

    _prepare_training(threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = FineTuningOptions(encoder, weights, neighbours, epochs, seed, device.value, instances)
    try:
        with _notices_on_stderr():
            plan = plan_finetuning(image, labels, output, options=options, voxel_size_nm=size, resume=resume)
            for note in plan.notes:
                typer.echo(f"mitoseg: {note}", err=True)
            found = plan.run(progress=True)
    except (ValueError, RuntimeError, ArithmeticError, OSError) as error:
        typer.echo(f"mitoseg: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stopped:
        typer.echo(
            f"mitoseg: {str(stopped) or 'stopped before the training began, and nothing was written.'}", err=True
        )
        raise typer.Exit(130) from None
    typer.echo(found.summary())
    use = ["mitoseg", "predict", image, output / "mask.tif", "--weights", found.model_path]
    typer.echo(shlex.join(map(str, use + (["--voxel-size", voxel_size] if voxel_size else []))))


@app.command()
def evaluate(
    prediction: Annotated[Path, typer.Argument(help="The predicted mask.", show_default=False)],
    truth: Annotated[Path, typer.Argument(help="The true mask.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    instances: Annotated[
        bool, typer.Option("--instances", help="The files number objects; without it they are masks.")
    ] = False,
    voxel_size: Annotated[
        str | None,
        typer.Option(
            metavar="z,y,x", help="Edges of a voxel in nm; else the files' own, the truth's first.", show_default=False
        ),
    ] = None,
) -> None:
    """Score a predicted mask against the true one: voxels, objects, surfaces.

    A mask has two values, of which the larger is foreground, in a TIFF, a
    folder of slices or an (OME-)Zarr.
    Of colours the largest channel counts; smooth masks are cut at half.

    boundary_iou_1 and boundary_iou_2 are the IoU of the voxels more than 1 or 2
    voxels (rows and columns, inside a slice) from the truth's boundaries: what
    remains when the uncertain rim of the labels is left out. They are not the
    "Boundary IoU" of Cheng et al. (2021).

    object_precision and object_recall count objects, which are connected by
    faces, edges or corners; two match if their IoU is above 0.5.

    surface_distance_nm is the average symmetric surface distance, null where a
    mask is empty or the voxel size unknown. A ratio of nothing to nothing is 1.

    For example:
      mitoseg evaluate predicted.tif labels.tif
      mitoseg evaluate predicted.tif labels.tif --voxel-size 5,5,5 --json
      mitoseg evaluate predicted.tif labels.tif --instances
    """
    size = None if voxel_size is None else _voxel_size(voxel_size)
    import json

    from mitoseg_lib.evaluation import evaluate_files
    from mitoseg_lib.stacks import StackError

    try:
        with _notices_on_stderr():
            found = evaluate_files(prediction, truth, voxel_size_nm=size, instances=instances, progress=True)
    except StackError as error:
        typer.echo(f"mitoseg: {error}", err=True)
        raise typer.Exit(1) from None
    except MemoryError:
        typer.echo("mitoseg: the volumes don't fit into memory; compare smaller stacks cut from them.", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("mitoseg: stopped.", err=True)
        raise typer.Exit(130) from None
    typer.echo(json.dumps(found.as_dict()) if as_json else found.as_table())


def _voxel_size(text: str) -> tuple[float, ...]:
    """Three lengths above 0, as in 30,8,8."""
    try:
        edges = tuple(float(part) for part in text.split(","))
    except ValueError:
        edges = ()
    if len(edges) != 3 or not all(0 < edge < math.inf for edge in edges):
        raise typer.BadParameter(
            f"{text!r} was given, but three lengths in nm above 0 were expected; write them as 30,8,8 (z,y,x).",
            param_hint="--voxel-size",
        )
    return edges


@contextmanager
def _notices_on_stderr() -> Iterator[None]:
    """Say what the library warns of in sentences like all others, without the line of code that it came from."""
    from mitoseg_lib.stacks import StackWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always", StackWarning)
        show = warnings.showwarning

        def echo(message: Warning, category: type[Warning], *place: object) -> None:
            if issubclass(category, StackWarning):
                typer.echo(f"mitoseg: {message}", err=True)
            else:
                show(message, category, *place)

        warnings.showwarning = echo
        yield


if __name__ == "__main__":
    app()
