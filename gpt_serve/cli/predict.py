"""The commands that answer for images on disk: ``predict`` and ``eval``. Heavy imports live inside them."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt_serve.cli.answers import Entries, show
from gpt_serve.cli.exits import EXIT_MISTAKE, EXIT_PARTLY
from gpt_serve.cli.options import (
    adapters_option,
    backbone_options,
    data_option,
    image_bytes,
    json_option,
    resolve_device,
    task_option,
)
from gpt_serve.errors import GPTServeError, ImageError, UsageError

if TYPE_CHECKING:
    from gpt_serve.adapters.store import AdapterStore
    from gpt_serve.bulk.parts import Parts
    from gpt_serve.engine.engine import Answer, Engine

CHUNK = 256  # images whose bytes are held at a time


@click.command("eval")
@task_option
@data_option
@click.option(
    "--slide/--whole",
    default=None,
    help="Segmentation: sliding windows, or each picture in a single input.  [as the adapter is served]",
)
@click.option("--multi-scale", is_flag=True, help="Segmentation: average six scales and their mirror images.")
@backbone_options
@adapters_option
@json_option
def evaluate(
    task: str,
    data: str,
    slide: bool | None,
    multi_scale: bool,
    adapters: Path | str,
    as_json: bool,
    **backbone: Any,
) -> None:
    """Accuracy of an adapter on DIR/test, or on DIR itself when it holds class folders; of masks their mIoU.

    Of a task whose images have several labels also the mean average precision.
    """
    engine = _engine([task], adapters, **backbone)

    def notice(text: str) -> None:
        click.echo(text, err=True)

    if engine.bank.store.load(task).adapter.kind == "segmentation":
        result = _evaluate_masks(engine, task, data, slide, multi_scale, notice)
    elif slide is not None or multi_scale:
        raise UsageError(f"--slide, --whole and --multi-scale are for segmentation, and {task!r} classifies")
    else:
        from gpt_serve.engine.evaluate import evaluate_task

        result = evaluate_task(engine, task, data, notice)
    if as_json:
        click.echo(json.dumps(result))
    elif "miou" in result:
        _echo_iou(result)
    else:
        mean = f"mean average precision {100 * result['map']:.2f} %, " if "map" in result else ""
        shown = f"{mean}accuracy {100 * result['accuracy']:.2f} %"
        click.echo(f"{task}: {shown} on {result['n']} images ({result['revision']})")


def _evaluate_masks(
    engine: "Engine", task: str, data: str, slide: bool | None, multi_scale: bool, notice: Callable[[str], object]
) -> dict[str, Any]:
    from gpt_serve.engine.evaluate_masks import Protocol, evaluate_masks

    if multi_scale and slide is False:
        raise UsageError("--multi-scale takes windows of each scale: leave --whole out")
    geometry: Any = None if slide is None else "windows" if slide else "squash"
    return evaluate_masks(engine, task, data, Protocol(geometry, multi_scale), notice)


def _echo_iou(result: dict[str, Any]) -> None:
    """A line per class, and one for all of them."""
    for label, iou in result["iou"].items():
        click.echo(f"  {label}: {'does not occur' if iou is None else f'IoU {100 * iou:.2f} %'}")
    accuracy = f"pixel accuracy {100 * result['pixel_accuracy']:.2f} %"
    images = f"on {result['n']} images ({result['revision']})"
    click.echo(f"{result['task']}: mIoU {100 * result['miou']:.2f} %, {accuracy} {images}")


@click.command()
@click.option("--task", "tasks", multiple=True, required=True, help="Name of the task; repeat for more.")
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--top-k",
    type=click.IntRange(1, 1000),
    help="Labels of an answer.  [default: 5, or all above their threshold where images have several]",
)
@click.option(
    "--masks",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    show_default=True,
    help="Where segmentation tasks write IMAGE.TASK.png.",
)
@click.option(
    "--input",
    "source",
    help="Instead of IMAGES: a folder of images, *.parquet, or an address such as s3://bucket/images. Needs --output.",
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="The table to write, FILE.parquet.")
@click.option("--column", help="Column of paths or image files in --input tables.  [default: image, or the only one]")
@click.option(
    "--ray-address",
    default="local",
    show_default=True,
    help="Ray cluster to predict --input on: auto for this machine's, or HOST:PORT. local: this machine alone.",
)
@backbone_options
@adapters_option
@json_option
def predict(
    tasks: tuple[str, ...],
    images: tuple[Path, ...],
    top_k: int | None,
    masks: Path,
    source: str | None,
    output: Path | None,
    column: str | None,
    ray_address: str,
    adapters: Path | str,
    as_json: bool,
    **backbone: Any,
) -> None:
    """Ask tasks about image files, or with --input and --output about a folder or a table of them.

    An image that cannot be read gets a line on stderr instead of an answer, with --json also an entry with "error", and
    with --output a row with its error. The exit code is 1 when some have no answer, and 2 when none has. A run with
    --output that was interrupted is continued by the same command.
    """
    if (source is None) != (output is None) or (source is None) != bool(images):
        raise UsageError("name what to classify: IMAGES, or --input with --output")
    if source is None and ray_address != "local":
        raise UsageError("--ray-address is for --input with --output: leave it out")
    if len(set(tasks)) != len(tasks):
        raise UsageError("a --task is given twice: give each once")
    if source is not None and output is not None:
        _predict_in_bulk(tasks, source, output, column, ray_address, adapters, as_json, **backbone)
        return
    engine = _engine(tasks, adapters, **backbone)
    making = Entries(tasks, top_k, masks)
    making.check_names(images, _segmenting(engine, tasks, top_k))
    entries: list[dict[str, Any]] = []
    for path, outcomes in _answers(engine, tasks, images):
        entries.append(making.entry(path, outcomes))
        show(entries[-1], errors_only=as_json)
    answers = [answer for entry in entries for answer in entry.get("answers", [entry])]
    failed = sum("error" in answer for answer in answers)
    if failed == len(answers):
        sys.exit(EXIT_MISTAKE)
    if as_json:
        asked = {"task": tasks[0]} if len(tasks) == 1 else {"tasks": list(tasks)}
        click.echo(json.dumps(asked | {"images": entries}))
    if failed:
        sys.exit(EXIT_PARTLY)


def _segmenting(engine: "Engine", tasks: Sequence[str], top_k: int | None) -> list[str]:
    """The tasks that answer with masks. Raises where that is all of them and labels are wanted."""
    found = [task for task in tasks if engine.bank.store.load(task).adapter.kind == "segmentation"]
    if top_k is not None and len(found) == len(tasks):
        raise UsageError(f"task {tasks[0]!r} answers with a mask of all its classes: leave out --top-k")
    return found


def _answers(engine: "Engine", tasks: Sequence[str], images: Sequence[Path]) -> Iterator[tuple[Path, list["Answer"]]]:
    """Each image with what the tasks say of it, in order."""
    for start in range(0, len(images), CHUNK):
        read = [(path, _read(path)) for path in images[start : start + CHUNK]]
        told = iter(engine.predict([(list(tasks), data) for _, data in read if isinstance(data, bytes)]))
        for path, data in read:
            outcomes: list[Answer] = next(told) if isinstance(data, bytes) else [data for _ in tasks]
            for outcome in outcomes:
                if isinstance(outcome, GPTServeError) and not isinstance(outcome, ImageError) and len(tasks) == 1:
                    raise outcome  # of the adapter: no image is to blame
            yield path, outcomes


def _read(path: Path) -> bytes | ImageError:
    """The file in a form that the engine takes, or why there is none."""
    try:
        return image_bytes(path)
    except ImageError as error:
        return error


def _predict_in_bulk(
    tasks: Sequence[str],
    source: str,
    output: Path,
    column: str | None,
    ray_address: str,
    adapters: Path | str,
    as_json: bool,
    **backbone: Any,
) -> None:
    from gpt_serve.bulk.inputs import open_images
    from gpt_serve.bulk.parts import Parts
    from gpt_serve.bulk.predict import predict_in_bulk
    from gpt_serve.cli.terminal import Terminal

    images = open_images(source, column)
    parts = Parts(output, images, tasks)
    with closing(Terminal()) as terminal:
        if ray_address == "local":
            engine = _engine(tasks, adapters, **backbone)
            done = predict_in_bulk(engine, tasks, images, parts, terminal.counting(len(images), "predicting"))
        else:
            run = _on_ray(ray_address, tasks, source, column, adapters, **backbone)
            done = run(parts, terminal.counting(len(images), "predicting"))
    if as_json:
        click.echo(json.dumps({"tasks": list(tasks), "output": str(output)} | done))
    else:
        click.echo(f"{output}: {done['rows']} rows of {done['images']} images, {done['errors']} with an error")
    if done["errors"]:
        sys.exit(EXIT_MISTAKE if done["errors"] == done["rows"] else EXIT_PARTLY)


def _on_ray(
    address: str, tasks: Sequence[str], source: str, column: str | None, adapters: Path | str, **backbone: Any
) -> "Callable[[Parts, Callable[[int], object]], dict[str, int]]":
    """How a Ray cluster completes parts; processes of other machines get absolute paths."""
    if find_spec("ray") is None:
        raise UsageError("--ray-address needs Ray: pip install 'gpt-serve[ray]'")
    from gpt_serve.cluster.bulk import Work, predict_on_ray

    _check(tasks, adapters)
    if "://" not in source:
        source = str(Path(source).absolute())
    place = adapters.resolve() if isinstance(adapters, Path) else adapters
    checkpoint = backbone["checkpoint"]
    backbone |= {"checkpoint": checkpoint and checkpoint.resolve()}
    work = Work(partial(_engine, tasks, place, **backbone), tuple(tasks), source, column)
    return partial(predict_on_ray, address, backbone["device"], work)


def _engine(
    tasks: Sequence[str],
    adapters: Path | str,
    *,
    backbone: str,
    checkpoint: Path | None,
    input_size: int | None,
    device: str,
) -> "Engine":
    """An engine that has the tasks; an unknown or broken one is reported before the backbone is loaded."""
    store = _check(tasks, adapters)
    from gpt_serve.engine.engine import Engine
    from gpt_serve.images.decode import LOCAL_LIMITS
    from gpt_serve.model.backbone import Backbone

    model = Backbone.load(backbone, checkpoint=checkpoint, input_size=input_size, device=resolve_device(device))
    engine = Engine(model, store, limits=LOCAL_LIMITS)
    for task in tasks:
        with engine.bank.holding(task):  # trouble is reported before anything is computed
            pass
    return engine


def _check(tasks: Sequence[str], adapters: Path | str) -> "AdapterStore":
    """The store, which has the tasks."""
    from gpt_serve.adapters.store import AdapterStore

    store = AdapterStore(adapters)
    for task in tasks:
        store.load(task)
    return store
