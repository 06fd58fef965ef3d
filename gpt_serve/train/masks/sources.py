"""The segmentation data that ``--data`` names: a folder, or a published data set by name."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from gpt_serve.errors import DataError
from gpt_serve.images.convert import readable
from gpt_serve.specs import Kind
from gpt_serve.train.data.samples import SPLITS, check_labels, composed_name
from gpt_serve.train.data.sources.hub import load_tables
from gpt_serve.train.data.sources.root import data_root
from gpt_serve.train.data.sources.vision import open_class
from gpt_serve.train.masks.folder import label_folder, open_mask_folder
from gpt_serve.train.masks.samples import NOTHING, MaskDataset, MaskSample, hold_out, local_sample

ADE20K = "ADEChallengeData2016"
_MASK_COLUMNS = ("annotation", "mask", "label", "segmentation_mask", "labels", "masks")
_VOC = "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant"


def find_kind(source: str) -> Kind:
    """Which kind of task the data are for, as far as ``source`` tells without being read."""
    name = source.partition("?")[0].lower().removeprefix("torchvision:")
    options = dict(parse_qsl(source.partition("?")[2]))
    folder = Path(source)
    if folder.is_dir():
        return (
            "segmentation" if label_folder(folder) is not None and not (folder / "train").is_dir() else "classification"
        )
    named = name in ("ade20k", "vocsegmentation", "cityscapes")
    return "segmentation" if named or "mask" in options else "classification"


def open_masks(source: str, seed: int, ignore: Sequence[int] | None = None) -> MaskDataset:
    """Open all splits of a folder of pictures and label files, or of a named data set.

    Without validation pictures, a fifth of ``train`` is held out by ``seed``.

    Args:
        ignore: values of label files that belong to no class; None for what the data set itself says.

    Raises:
        DataError: one line that says what is wrong and what to do.
    """
    dataset = _open(source, ignore)
    if not dataset.train:
        raise DataError(f"--data {source} has no training pictures: expected images/train")
    return hold_out(dataset, seed)


def open_mask_test(source: str, labels: Sequence[str], ignore: Sequence[int]) -> MaskDataset:
    """Open the pictures that ``eval`` measures on: the test split, or validation pictures where there is none.

    Args:
        labels: the classes of the adapter, whose places are the ids that its masks have.
        ignore: values of label files that it was trained to ignore.

    Raises:
        DataError: no such data, nothing to measure on, or a class that the adapter does not know.
    """
    dataset = _open(source, ignore if Path(source).is_dir() else None)
    test = dataset.test or dataset.val
    if not test:
        raise DataError(f"--data {source} has neither test nor validation pictures with label files")
    check_labels(f"--data {source}", labels, dataset.labels)
    places = {composed_name(label): number for number, label in enumerate(labels)}
    values = {value: places[dataset.labels[number]] for value, number in dataset.values.items()}
    return MaskDataset(tuple(labels), values, dataset.ignore, test=test, unused=dataset.unused)


def _open(source: str, ignore: Sequence[int] | None) -> MaskDataset:
    if Path(source).is_dir():
        return open_mask_folder(Path(source), ignore)
    name, _, query = source.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    known: dict[str, Callable[[], MaskDataset]] = {
        "ade20k": _ade20k,
        "vocsegmentation": partial(_voc, options),
        "oxfordiiitpet": _pets,
        "cityscapes": _cityscapes,
    }
    opener = known.get(name.lower().removeprefix("torchvision:"))
    if opener is not None:
        if options and opener.__class__ is not partial:
            raise DataError(f"--data {source}: {name} takes no options: leave out ?{query}")
        return opener()
    if name.startswith("hf:") or "/" in name:
        return _hub(name.removeprefix("hf:"), options, ignore)
    raise DataError(
        f"--data {source}: no such folder or segmentation data: give a folder with images/ and labels/, ade20k, "
        "torchvision:VOCSegmentation, OxfordIIITPet or Cityscapes, or hf:OWNER/NAME?mask=COLUMN"
    )


def _ade20k() -> MaskDataset:
    root = data_root() / ADE20K
    if not root.is_dir():
        raise DataError(
            f"--data ade20k: not in {root}: unpack ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark there"
        )
    return open_mask_folder(root)


def _voc(options: Mapping[str, str]) -> MaskDataset:
    """Pascal VOC: value 0 is background, 255 the border between objects; results are reported on ``val``."""
    labels = ("background", *_VOC.split(), "sheep", "sofa", "train", "tvmonitor")
    if unknown := sorted(set(options) - {"year"}):
        raise DataError(f"--data torchvision:VOCSegmentation: no option {unknown[0]!r}: use year")
    splits = {}
    for split in ("train", "val"):
        data = open_class("VOCSegmentation", {"image_set": split, **options})
        splits[split] = _local(data.images, data.masks)
    return MaskDataset(
        labels, {value: value for value in range(len(labels))}, (NOTHING,), splits["train"], test=splits["val"]
    )


def _local(pictures: Sequence[str], labels: Sequence[str]) -> list[MaskSample]:
    return [local_sample(Path(picture), Path(mask)) for picture, mask in zip(pictures, labels, strict=True)]


def _pets() -> MaskDataset:
    """Oxford-IIIT Pet's trimaps: 1 the animal, 2 what is behind it; 3, the border, belongs to neither."""
    splits = {}
    for split, given in (("train", "trainval"), ("test", "test")):
        data = open_class("OxfordIIITPet", {"split": given, "target_types": "segmentation"})
        splits[split] = _local(data._images, data._segs)
    return MaskDataset(("pet", "background"), {1: 0, 2: 1}, (3,), splits["train"], test=splits["test"])


def _cityscapes() -> MaskDataset:
    """Cityscapes' fine annotations, with 19 classes and the others ignored; results are reported on ``val``."""
    splits = {}
    for split in ("train", "val"):
        data = open_class("Cityscapes", {"split": split, "mode": "fine", "target_type": "semantic"})
        splits[split] = _local(data.images, [targets[0] for targets in data.targets])
    measured = sorted((kind.train_id, kind) for kind in data.classes if 0 <= kind.train_id < NOTHING)
    values = {kind.id: number for number, (_, kind) in enumerate(measured)}
    ignored = (*(kind.id for kind in data.classes if kind.id not in values and kind.id >= 0), NOTHING)
    names = tuple(kind.name for _, kind in measured)
    return MaskDataset(names, values, ignored, splits["train"], test=splits["val"])


def _hub(name: str, options: Mapping[str, str], ignore: Sequence[int] | None) -> MaskDataset:
    """A Hugging Face data set with a column of pictures and one of masks.

    Raises:
        DataError: the library is missing or cannot get it, or columns or splits are not what they must be.
    """
    if unknown := sorted(set(options) - {"config", "image", "mask", "classes", *SPLITS}):
        raise DataError(
            f"--data hf:{name}: no option {unknown[0]!r}: use config, image, mask, classes, train, val, test"
        )
    tables = load_tables(name, options.get("config"))
    usual = {split: key for split, aliases in SPLITS.items() for key in reversed(aliases) if key in tables}
    found = usual | {split: options[split] for split in SPLITS if split in options}
    if missing := [key for key in found.values() if key not in tables]:
        raise DataError(f"--data hf:{name}: no split {missing[0]!r}: it has {', '.join(tables)}")
    if "train" not in found:
        raise DataError(f"--data hf:{name}: no split 'train' ({', '.join(tables)}): append ?train=SPLIT")
    image, mask = _columns(name, tables[found["train"]].features, options)
    splits = {split: _rows(f"{name}/{key}", tables[key], image, mask) for split, key in found.items()}
    if "classes" not in options:
        raise DataError(f"--data hf:{name}: append ?classes=a,b,c, the names of the masks' values from 0 on")
    labels = tuple(options["classes"].split(","))
    ignored = (NOTHING,) if ignore is None else tuple(ignore)
    values = {value: value for value in range(len(labels))}
    return MaskDataset(labels, values, ignored, *(splits.get(split, ()) for split in SPLITS))


def _columns(name: str, features: Mapping[str, Any], options: Mapping[str, str]) -> tuple[str, str]:
    import datasets

    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    mask = options.get("mask") or next((column for column in _MASK_COLUMNS if column in pictures), None)
    image = options.get("image") or next((column for column in pictures if column != mask), None)
    if mask not in pictures or image not in pictures or mask == image:
        raise DataError(
            f"--data hf:{name}: it has the columns {', '.join(features)}, of pictures {', '.join(pictures) or 'none'}: "
            "append ?image=COLUMN&mask=COLUMN"
        )
    assert image is not None and mask is not None
    return image, mask


def _rows(name: str, table: Any, image: str, mask: str) -> list[MaskSample]:
    import datasets

    files = table.select_columns([image, mask])
    for column in (image, mask):
        files = files.cast_column(column, datasets.Image(decode=False))

    def read(index: int, column: str) -> bytes:
        stored = files[index][column]
        if stored is None:
            raise OSError("the row holds no image")
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()

    def picture(index: int) -> bytes:
        return readable(read(index, image))

    return [
        MaskSample(f"{name}/{index}", partial(picture, index), f"{name}/{index} ({mask})", partial(read, index, mask))
        for index in range(len(files))
    ]
