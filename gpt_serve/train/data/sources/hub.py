"""Data sets of the Hugging Face hub, by the library ``datasets`` (the extra ``hf``)."""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from gpt_serve.errors import DataError
from gpt_serve.images.convert import readable
from gpt_serve.model.hub import offline_without_answer
from gpt_serve.train.data.samples import (
    SPLITS,
    Dataset,
    Indexed,
    Split,
    check_names,
    composed_name,
    counted,
    some,
    without_splits,
)

OPTIONS = ("config", "image", "label", "train", "val", "test")


def open_hub(name: str, options: Mapping[str, str], splits: Collection[str]) -> Dataset:
    """Open a data set by its id, or a folder that the library reads; downloads lie in the library's own cache.

    Args:
        name: ``owner/name``.
        options: ``config``; ``image`` and ``label``, the columns; ``train``, ``val`` and ``test``, the splits' names.
        splits: of ``train``, ``val`` and ``test``: those that are wanted; others may be left out.

    Raises:
        DataError: the library is missing or cannot get it, or columns, splits or labels are not what they must be.
    """
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise DataError(f"--data hf:{name}: no option {unknown[0]!r}: use {', '.join(OPTIONS)}")
    tables = load_tables(name, options.get("config"))
    found = _find_splits(name, list(tables), options)
    first = tables[found["train"]]
    image, label = _columns(name, first.features, options)
    wanted = {split: tables[key] for split, key in found.items() if split in splits or len(found) == 1}
    if not wanted:
        return Dataset(())
    targets = {split: table.select_columns([label])[:][label] for split, table in wanted.items()}
    classes = _classes(name, label, first, targets)
    labels = check_names(list(dict.fromkeys(classes.values())), f"hf:{name}")
    places = {item: target for target, item in enumerate(labels)}
    position = {value: places[composed_name(item)] for value, item in classes.items()}
    opened = {
        split: _split(f"{name}/{found[split]}", table, image, targets[split], position)
        for split, table in wanted.items()
    }
    if len(found) == 1:
        return without_splits(opened["train"], labels, f"hf:{name}")
    others = [f"{key} ({counted(len(tables[key]), 'image')})" for key in tables if key not in found.values()]
    unused = (f"not used: the splits {some(others)}",) if others else ()
    return Dataset(labels, *(opened.get(split, ()) for split in SPLITS), unused=unused)


def load_tables(name: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"--data {name}: no such folder; a Hugging Face data set needs: pip install 'gpt-serve[hf]'"
        ) from error
    try:
        with nullcontext() if Path(name).exists() else offline_without_answer():
            return datasets.load_dataset(name, name=config)
    except Exception as error:  # errors of the library, of the hub and of the network share no narrower base
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"--data hf:{name}: no such folder, and the Hugging Face data set cannot be loaded ({reason}): "
            f"see https://huggingface.co/datasets/{name}"
        ) from error


def _find_splits(name: str, present: list[str], options: Mapping[str, str]) -> dict[str, str]:
    """Find what the data set calls each split. A split that the options name is used for nothing else."""
    given = {split: options[split] for split in SPLITS if split in options}
    if missing := [key for key in given.values() if key not in present]:
        raise DataError(f"--data hf:{name}: no split {missing[0]!r}: it has {', '.join(present)}")
    free = [key for key in present if key not in given.values()]
    usual = {split: key for split, names in SPLITS.items() for key in reversed(names) if key in free}
    found = usual | given
    if "train" not in found and len(present) == 1:
        return {"train": present[0]}
    if "train" not in found:
        raise DataError(f"--data hf:{name}: no split 'train' ({', '.join(present)}): append ?train=SPLIT")
    return found


def _columns(name: str, features: Mapping[str, Any], options: Mapping[str, str]) -> tuple[str, str]:
    """Find the names of the columns that hold the image and the label."""
    import datasets

    columns = {}
    for what, kind in (("image", datasets.Image), ("label", datasets.ClassLabel)):
        fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
        chosen = options.get(what)
        if chosen is None and len(fitting) != 1:
            words = f"several {what} columns ({', '.join(fitting)})" if fitting else f"no {what} column"
            raise DataError(f"--data hf:{name}: {words}; columns: {', '.join(features)}: append ?{what}=COLUMN")
        if chosen is not None and (chosen not in features or (what == "image" and chosen not in fitting)):
            raise DataError(f"--data hf:{name}: no {what} column {chosen!r}: it has {', '.join(fitting or features)}")
        columns[what] = chosen or fitting[0]
    return columns["image"], columns["label"]


def _classes(name: str, label: str, table: Any, targets: Mapping[str, list[Any]]) -> dict[Any, str]:
    """Name each value of the label column, in the order of the classes. Values of the same name are one class."""
    feature = table.features[label]
    if names := getattr(feature, "names", None):
        check_names(names, f"hf:{name}")
        return dict(enumerate(names))
    values = [value for split in targets.values() for value in split]
    if not all(isinstance(value, str | int) for value in values):
        raise DataError(f"--data hf:{name}: the column {label!r} holds no classes: append ?label=COLUMN")
    ordered = sorted(set(values), key=lambda value: (str(type(value)), value))
    return {value: composed_name(str(value)) for value in ordered}


def _split(name: str, table: Any, image: str, values: list[Any], position: Mapping[Any, int]) -> Split:
    import datasets

    if unlabelled := [value for value in values if value not in position]:
        split = name.rpartition("/")[2]
        raise DataError(
            f"--data hf:{name}: {len(unlabelled)} images have no class ({unlabelled[0]}): "
            f"choose another split for it, such as ?{'test' if split == 'test' else 'val'}=SPLIT"
        )
    files = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return Indexed(name, partial(_read, files, image), [position[value] for value in values], range(len(values)))


def _read(files: Any, image: str, index: int) -> bytes:
    stored = files[index][image]
    if stored is None:
        raise OSError("the row holds no image")
    return readable(stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes())
