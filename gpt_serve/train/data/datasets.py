"""The data set that ``--data`` names: an image folder, or a published one by name.

Opening one reads lists and labels, never the images: a `Sample` reads its own when it is asked to.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl

from gpt_serve.errors import DataError
from gpt_serve.train.data.samples import (
    Dataset,
    Indexed,
    Sample,
    Split,
    check_labels,
    composed_name,
    digest,
    hold_out,
    hold_out_any,
)
from gpt_serve.train.data.sources.benchmarks import open_fgvc, open_vtab
from gpt_serve.train.data.sources.digits import open_digits
from gpt_serve.train.data.sources.folder import open_folder, open_test_folder
from gpt_serve.train.data.sources.hub import open_hub
from gpt_serve.train.data.sources.labels_csv import has_tables, open_tables, open_test_table
from gpt_serve.train.data.sources.published import published
from gpt_serve.train.data.sources.vision import check_vision_class, open_vision, vision_classes
from gpt_serve.train.recipes.paper_table import find_task

__all__ = ["Dataset", "Indexed", "Sample", "Split", "digest", "find_benchmark", "open_dataset", "open_evaluation"]

Benchmark = Literal["fgvc", "vtab"]
Kind = Literal["folder", "digits", "fgvc", "vtab", "torchvision", "hf"]

BENCHMARKS: dict[str, Kind] = {"FGVC": "fgvc", "VTAB-1K": "vtab"}
ALL = ("train", "val", "test")


@dataclass(frozen=True)
class Source:
    """What a value of ``--data`` names: the kind of source, the name of the data there, and the options after ``?``."""

    kind: Kind
    name: str
    options: Mapping[str, str] = field(default_factory=dict)


def open_dataset(source: str, seed: int) -> Dataset:
    """Open all splits of an image folder ``source/{train,val,test}/<class>/*`` or of a named data set.

    Without validation images, a fifth of each class of ``train`` is held out by ``seed``.

    Raises:
        DataError: one line that says what is wrong and what to do.
    """
    dataset = _open(_resolve(source), ALL)
    if dataset.val:
        return dataset
    if dataset.multi_label:
        train, val = hold_out_any(dataset.train, seed)
        return replace(dataset, train=train, val=val)
    train, val = hold_out(dataset.train, dataset.labels, seed, source)
    return replace(dataset, train=train, val=val)


def open_evaluation(source: str, labels: Sequence[str]) -> Dataset:
    """Open the images that ``eval`` uses: the test split, or an image folder itself if it holds class folders.

    Args:
        labels: the classes of the adapter, which targets index.

    Returns:
        A data set that has images in ``test`` alone.

    Raises:
        DataError: no such data, no test split, or a class that the adapter does not know.
    """
    found = _resolve(source)
    if found.kind == "folder":
        root = Path(found.name)
        return open_test_table(root, labels) if has_tables(root) else open_test_folder(root, labels)
    dataset = _open(found, ("test",))
    if not dataset.test:
        raise DataError(f"--data {source} has no test split")
    check_labels(f"--data {source}", labels, dataset.labels)
    places = {composed_name(label): target for target, label in enumerate(labels)}
    position = [places[label] for label in dataset.labels]
    test = dataset.test
    if position != list(range(len(position))):
        test = [replace(sample, target=position[sample.target]) for sample in test]
    return Dataset(tuple(labels), test=test, unused=dataset.unused)


def find_benchmark(source: str) -> tuple[Benchmark, str] | None:
    """Find the benchmark whose preprocessing and protocol belong to ``source``.

    Returns:
        The benchmark and the name of its task there; None for data of no benchmark.

    Raises:
        DataError: there is no data of that name.
    """
    found = _resolve(source)
    return (found.kind, found.name) if found.kind == "fgvc" or found.kind == "vtab" else None


def _open(source: Source, splits: Collection[str]) -> Dataset:
    match source.kind:
        case "folder":
            root = Path(source.name)
            return open_tables(root) if has_tables(root) else open_folder(root)
        case "digits":
            return open_digits()
        case "fgvc":
            return open_fgvc(source.name)
        case "vtab":
            return open_vtab(source.name)
        case "torchvision":
            return open_vision(source.name, source.options, splits)
        case "hf":
            return open_hub(source.name, source.options, splits)


def _resolve(source: str) -> Source:
    """Decide what ``source`` names: a folder if there is one, else a data set by its name and options.

    Raises:
        DataError: neither.
    """
    try:
        there = Path(source).exists()
    except OSError as error:
        raise DataError(f"--data {source[:100]} cannot be read: {error.strerror}") from error
    if there:
        if not Path(source).is_dir():
            raise DataError(f"--data {source} is a file: give an image folder or the name of a data set")
        return Source("folder", source)
    name, _, query = source.partition("?")
    found = _named(name)
    if found is None:
        raise _unknown(source)
    if query and found.kind not in ("torchvision", "hf"):
        raise DataError(f"--data {source}: {name} takes no options: leave out ?{query}")
    return replace(found, options=dict(parse_qsl(query, keep_blank_values=True)))


def _named(name: str) -> Source | None:
    """Find a data set by its prefix, else by its name; None if there is none.

    A name without prefix is looked for as torchvision spells it, then among the tasks of the paper, then among
    torchvision's in any case.

    Tasks are spelled in lower case and torchvision's classes with capitals, which tells ``flowers102`` of VTAB-1K from
    ``Flowers102``.
    """
    prefix, colon, rest = name.partition(":")
    classes = {item.lower(): item for item in vision_classes()}
    if prefix == "hf" and colon:
        return Source("hf", rest)
    if prefix == "torchvision" and colon:
        return Source("torchvision", classes[rest.lower()]) if rest.lower() in classes else None
    if name == "digits":
        return Source("digits", name)
    if name not in classes.values() and (task := _benchmark_task(name)):
        return task
    if name.lower() in classes:
        return Source("torchvision", classes[name.lower()])
    looks_like_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not name.startswith(("fgvc/", "vtab/"))
    return Source("hf", name) if looks_like_id else None


def _benchmark_task(name: str) -> Source | None:
    """Find ``fgvc/TASK``, ``vtab/TASK`` or ``TASK`` alone, by any of the names that the paper's table has for it."""
    kind, _, task = name.rpartition("/")
    found = find_task(task)
    if found is None or found[1] not in BENCHMARKS:
        return None
    source = Source(BENCHMARKS[found[1]], found[0])
    return source if kind in ("", source.kind) else None


def _unknown(source: str) -> DataError:
    """The error for a name that is unknown; it suggests the known name that is most like it."""
    check_vision_class(source.removeprefix("torchvision:"))
    names = ["digits", *(f"torchvision:{name}" for name in vision_classes())]
    names += [f"{kind}/{task}" for kind in ("fgvc", "vtab") for task in published(kind)["tasks"]]
    known = {spelling.lower(): name for name in names for spelling in (name, re.split("[:/]", name)[-1])}
    close = get_close_matches(source.partition("?")[0].lower(), known, n=1, cutoff=0.7)
    hint = f" (did you mean {known[close[0]]}?)" if close else ""
    return DataError(
        f"--data {source}: no such folder or data set{hint}: give an image folder, digits, fgvc/TASK, vtab/TASK, "
        "torchvision:CLASS (of image classification) or hf:OWNER/NAME"
    )
