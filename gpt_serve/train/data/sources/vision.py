"""Data sets of ``torchvision.datasets``: classification, with the splits that each class publishes."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image

from gpt_serve.errors import DataError
from gpt_serve.images.convert import encode_png, readable
from gpt_serve.train.data.samples import SPLITS, Dataset, Indexed, Split, check_names, without_splits
from gpt_serve.train.data.sources.published import published
from gpt_serve.train.data.sources.root import data_root

# Arguments of torchvision's classes that are decided here.
NO_OPTIONS = {"root", "download", "loader", "transform", "target_transform", "train", "split", "kwargs"}
NO_OPTIONS |= {"target_type", "target_types"}


def vision_classes() -> list[str]:
    """The names of the classes that can be trained on."""
    return list(published("torchvision"))


def check_vision_class(name: str) -> None:
    """Raise `DataError` if ``name`` is a data set of torchvision's without a class for each image."""
    import torchvision.datasets

    others = {other.lower(): other for other in torchvision.datasets.__all__}
    if name.lower() in others:
        raise DataError(
            f"--data torchvision:{others[name.lower()]} has no class for each image (it is for another kind of task), "
            f"or none that is supported: use one of {', '.join(vision_classes())}"
        )


def open_vision(name: str, options: Mapping[str, str], splits: Collection[str]) -> Dataset:
    """Open a data set of `vision_classes`, which is downloaded into the data root unless it is there.

    Args:
        name: name of torchvision's class.
        options: other arguments of the class, such as ``partition=2`` of DTD.
        splits: of ``train``, ``val`` and ``test``: those that are wanted; others may be left out.

    Raises:
        DataError: it cannot be downloaded, is damaged, or takes no such option.
    """
    entry = published("torchvision")[name]
    arguments = _arguments(name, options)
    if not entry["splits"]:
        return _unsplit(name, open_class(name, arguments))
    chosen = {split: given for split, given in entry["splits"].items() if split in splits}
    opened = {split: open_class(name, arguments | given) for split, given in chosen.items()}
    targets = {split: _targets(name, data) for split, data in opened.items()}
    labels, position = _labels(name, next(iter(opened.values())), targets.values())
    splits = {split: _split(f"{name}/{split}", data, targets[split], position) for split, data in opened.items()}
    return Dataset(labels, *(splits.get(split, ()) for split in SPLITS))


def _unsplit(name: str, data: Any) -> Dataset:
    targets = _targets(name, data)
    labels, position = _labels(name, data, [targets])
    return without_splits(_split(name, data, targets, position), labels, f"torchvision:{name}")


def _split(name: str, data: Any, targets: Sequence[int], position: Mapping[int, int]) -> Split:
    return Indexed(name, partial(_read, data), [position[target] for target in targets], range(len(targets)))


def _read(data: Any, index: int) -> bytes:
    """Read the file of an image if the class keeps files, else encode the pixels as PNG."""
    image = data[index][0]
    if isinstance(image, Image.Image):
        path = getattr(image, "filename", "")
        if not path:
            return encode_png(image)
        image.close()
        image = path
    return readable(Path(image).read_bytes())


def _targets(name: str, data: Any) -> list[int]:
    """Find the class of each image, without decoding any if possible."""
    for attribute in ("targets", "labels", "y", "_labels"):
        if (found := getattr(data, attribute, None)) is not None:
            return [int(target) for target in found]
    try:
        pairs = getattr(data, "_samples", None) or (data[index] for index in range(len(data)))
        targets = [target for _, target in pairs]
    except Exception as error:  # those of the class and of its file format
        raise DataError(f"--data torchvision:{name}: cannot be read in {data_root()}: {_reason(error)}") from error
    if None in targets:
        raise DataError(f"--data torchvision:{name}: the files hold images without a class: get those that have them")
    return [int(target) for target in targets]


def _labels(name: str, data: Any, targets: Collection[Sequence[int]]) -> tuple[tuple[str, ...], dict[int, int]]:
    """Name the classes, by their numbers if the library has no names, and give each number its target."""
    named = getattr(data, "classes", None) or getattr(data, "categories", None)
    if named is None:
        numbers = sorted({target for split in targets for target in split})
        return check_names([str(number) for number in numbers], name), {n: i for i, n in enumerate(numbers)}
    # ImageNet's are tuples of synonyms, and it has two kinds of crane.
    plain = [item if isinstance(item, str) else ", ".join(item) for item in named]
    labels = [label if plain.count(label) == 1 else f"{label} ({number})" for number, label in enumerate(plain)]
    return check_names(labels, name), {number: number for number in range(len(labels))}


def _arguments(name: str, options: Mapping[str, str]) -> dict[str, Any]:
    known = inspect.signature(_class(name)).parameters
    allowed = sorted(set(known) - NO_OPTIONS)
    if unknown := sorted(set(options) - set(allowed)):
        has = ", ".join(allowed) or "none"
        raise DataError(f"--data torchvision:{name}: it has no option {unknown[0]!r} (it has: {has})")
    return {key: int(value) if value.isdecimal() else value for key, value in options.items()}


def _class(name: str) -> Any:
    import torchvision.datasets

    return getattr(torchvision.datasets, name)


def open_class(name: str, arguments: Mapping[str, Any]) -> Any:
    from torchvision.datasets import ImageFolder

    kind, root = _class(name), data_root()
    parameters = inspect.signature(kind).parameters
    given = dict(arguments)
    if "loader" in parameters or issubclass(kind, ImageFolder):
        given["loader"] = str  # the path of an image instead of its pixels
    downloads = "download" in parameters
    try:
        return kind(str(root), **given, **({"download": False} if downloads else {}))
    except (RuntimeError, FileNotFoundError) as error:  # what these classes raise when files are missing
        if not downloads:
            raise DataError(_missing(name, root, error)) from error
    # torchvision's errors, and those of what it downloads and unpacks with, share no narrower base.
    except Exception as error:
        raise DataError(f"--data torchvision:{name}: cannot be read in {root}: {_reason(error)}") from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):  # of several processes one downloads
            return kind(str(root), download=True, **given)
    except Exception as error:
        raise DataError(_missing(name, root, error)) from error


def _missing(name: str, root: Path, error: Exception) -> str:
    entry = published("torchvision").get(name) or published("masks")[name]
    how = "as they are" if entry.get("packed") else "archives unpacked"
    return (
        f"--data torchvision:{name}: not in {root} and cannot be downloaded ({_reason(error)}): "
        f"put {entry['get']} into {root / entry['into']}, {how}"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
