"""Classify images with a graph that `gpt-serve export` wrote. Needs numpy, pillow and onnxruntime; no torch.

    python run.py flowers.onnx photo.jpg ...
    python run.py multi.onnx --task flowers photo.jpg ...      # reads flowers.safetensors of its bank, too

Copy it beside any graph (with bank.py and adapter_file.py if that has several tasks) and run it there, or import
`Model`.
"""

import argparse
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # or it keeps a device id on disk and reports to Microsoft
import onnxruntime as ort  # noqa: E402

FORMAT = "gpt-serve-onnx/1"
CPU = "CPUExecutionProvider"
BATCH = 32  # most images in a run
MAX_PIXELS = 50_000_000
LEAST_KNOWN = 0.05  # an image that fewer of the validation images lie as far out as is a stranger's
MAX_STRETCH = 50  # a side that scaling would make this many times what it must cover loses its ends first
TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")


class RunnerError(Exception):
    """A file or an argument that its user can put right; the message is one line."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        revision: of its adapter.
        labels: the ``C`` class names.
        preprocess: see gpt_serve/specs.py.
        thresholds: (C,) probabilities from which on labels are given, where an image may have several; else None.
    """

    name: str
    revision: str
    labels: list[str]
    preprocess: dict[str, Any]
    thresholds: list[float] | None = None


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer for one image.

    Attributes:
        probabilities: float32 (C,).
        known: the share of the task's validation images that lie at least as far from what it was trained on, in
            [0, 1]; None where the graph cannot tell.
    """

    task: Task
    probabilities: np.ndarray
    known: float | None = None

    @property
    def unknown(self) -> bool | None:
        """Whether the image is unlike what the task was trained on; None where the graph cannot tell."""
        return None if self.known is None else self.known < LEAST_KNOWN

    def top(self, k: int) -> list[tuple[str, float]]:
        """The ``k`` most probable (label, probability) pairs, best first."""
        best = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.task.labels[at], float(self.probabilities[at])) for at in best]

    def listed(self, k: int | None = None) -> list[tuple[str, float]]:
        """`top` of ``k``; without it of 5, or where an image may have several labels all above their threshold."""
        if k is not None or self.task.thresholds is None:
            return self.top(5 if k is None else k)
        above = dict(zip(self.task.labels, self.probabilities >= np.array(self.task.thresholds, np.float32)))  # noqa: B905
        return [pair for pair in self.top(len(above)) if above[pair[0]]]


class Model:
    """A graph and, for a multi-task graph, the adapters in the bank folder beside it.

    Args:
        tasks: which adapters of a multi-task graph to hold; all by default.
        providers: of onnxruntime, best first; unless the CPU is among them, no node may run there.

    Attributes:
        tasks: `Task` by name, in the order that ``index`` counts.
        bank: the inputs of a multi-task graph that stay the same from run to run, by name.

    Raises:
        RunnerError: whatever is wrong with the files, the tasks or the providers.
    """

    def __init__(self, path: str | Path, tasks: Sequence[str] = (), providers: Sequence[str] = (CPU,)) -> None:
        path = Path(path)
        while True:
            opened = identity(path)
            try:
                return self._open(path, tasks, providers)
            except RunnerError:
                if identity(path) == opened:
                    raise  # else another export took its place while it was read, and its files away

    def _open(self, path: Path, tasks: Sequence[str], providers: Sequence[str]) -> None:
        self.session = open_session(path, providers)
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        if (found := self.metadata.get("format", "none")) != FORMAT:
            raise RunnerError(f"{path} is not a graph of gpt-serve export: its format is {found!r:.60}, not {FORMAT!r}")
        self.bank: dict[str, np.ndarray] = {}
        if self.metadata["kind"] == "multi":
            from bank import read_bank  # a file that single-task graphs do without

            shapes = {item.name: item.shape for item in self.session.get_inputs()}
            folder = path.with_name(Path(self.metadata.get("bank", f"{path.stem}.bank")).name)
            try:
                held, self.bank = read_bank(folder, tasks, self.metadata, shapes)
            except ValueError as error:
                raise RunnerError(str(error)) from error
        else:
            labels, preprocess = json.loads(self.metadata["labels"]), json.loads(self.metadata["preprocess"])
            thresholds = json.loads(self.metadata.get("thresholds", "null"))
            held = [(self.metadata["task"], self.metadata["revision"], labels, preprocess, thresholds)]
            if set(tasks) - {self.metadata["task"]}:
                raise RunnerError(f"{path} has no task {', '.join(tasks)}: it answers for {self.metadata['task']}")
        self.tasks = {own[0]: Task(*own) for own in held}

    def predict(self, images: Iterable[Image.Image], tasks: str | Sequence[str] | None = None) -> list[Prediction]:
        """Classify images, `BATCH` at a time; of an iterator's images only one is held in full size.

        Args:
            images: of any size and mode.
            tasks: a name for all images or one for each; may be left out if the model holds a single task.

        Raises:
            RunnerError: unknown task.
            ValueError: not as many tasks as images.
        """
        if tasks is None:
            if len(self.tasks) > 1:
                raise RunnerError(f"the graph has several tasks, name one: {', '.join(self.tasks)}")
            (tasks,) = self.tasks
        if unknown := ({tasks} if isinstance(tasks, str) else set(tasks)) - set(self.tasks):
            raise RunnerError(f"no task {', '.join(sorted(unknown))}: there are {', '.join(self.tasks)}")
        jobs = zip(images, repeat(tasks)) if isinstance(tasks, str) else zip(images, tasks, strict=True)  # noqa: B905
        rows = {name: row for row, name in enumerate(self.tasks)}
        answers: list[Prediction] = []
        prepared = ((self.tasks[name], prepare(image, self.tasks[name].preprocess)) for image, name in jobs)
        while batch := list(islice(prepared, BATCH)):
            asked, pixels = zip(*batch, strict=True)
            found = self.outputs(np.stack(pixels), np.array([rows[task.name] for task in asked]))
            shares = [round(float(share), 4) for share in found["known"]] if "known" in found else repeat(None)
            for task, row, known in zip(asked, self._probabilities(found), shares):  # noqa: B905
                answers.append(Prediction(task, row[: len(task.labels)], known))
        return answers

    def run(self, pixels: np.ndarray, index: np.ndarray) -> np.ndarray:
        """One run of the graph.

        Args:
            pixels: uint8 (B, H, W, 3) from `prepare`.
            index: int (B,), each image's task by its position in ``tasks``.

        Returns:
            float32 (B, C) probabilities; a task's own classes are the first ones.
        """
        return self._probabilities(self.outputs(pixels, index))

    def outputs(self, pixels: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs of the graph by name."""
        # onnxruntime would silently answer -1 with the last task.
        if not np.all((index >= 0) & (index < len(self.tasks))):
            raise RunnerError(f"index points at no task: use 0 to {len(self.tasks) - 1}")
        feeds = self.bank | {"images": pixels, "index": index.astype(np.int64)}
        if self.metadata.get("input") == "float":
            (task,) = self.tasks.values()
            mean, std = (np.array(task.preprocess[key], np.float32) for key in ("mean", "std"))
            feeds["images"] = ((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
        names = [item.name for item in self.session.get_outputs()]
        found = self.session.run(names, {item.name: feeds[item.name] for item in self.session.get_inputs()})
        return dict(zip(names, found, strict=True))

    def _probabilities(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        scores = outputs[self.metadata["output"]]
        if self.metadata["output"] == "logits" and "thresholds" in self.metadata:
            with np.errstate(over="ignore"):  # exp(88) and more is infinite: a probability of 0
                return 1 / (1 + np.exp(-scores))
        if self.metadata["output"] == "logits":
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            scores /= scores.sum(axis=1, keepdims=True)
        return scores


def identity(path: Path) -> tuple[int, int] | None:
    """What tells the file at ``path`` from one that replaces it; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def open_session(path: Path, providers: Sequence[str]) -> ort.InferenceSession:
    """A session that really uses the first of ``providers``: onnxruntime by itself falls back to the CPU."""
    if not path.is_file():
        raise RunnerError(f"{path} does not exist: write it with gpt-serve export")
    if unknown := set(providers) - set(there := ort.get_available_providers()):
        raise RunnerError(f"this onnxruntime has no {', '.join(unknown)}: it has {', '.join(there)}")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails also raises
    if CPU not in providers:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    hint = f"install onnxruntime-gpu[cuda,cudnn], or let the CPU do the rest: --providers {providers[0]},{CPU}"
    refused = RunnerError(f"{providers[0]} does not run here, or not all of the graph: {hint}")
    try:
        session = ort.InferenceSession(path, options, providers=list(providers), enable_fallback=0)
    except Exception as error:  # onnxruntime's errors have no base class of their own
        text = " ".join(str(error).split())
        if "External" in text:
            raise RunnerError(f"{path} needs its weights, a .data file, beside it: move both together") from error
        if isinstance(error, RuntimeError) or "CPU EP" in text:
            raise refused from error
        raise RunnerError(f"{path} is not an ONNX graph that onnxruntime {ort.__version__} loads: {text}") from error
    if session.get_providers()[0] != providers[0]:
        raise refused
    return session


def open_image(path: str | Path) -> Image.Image:
    """Decode a JPEG, PNG or WebP file of at most `MAX_PIXELS`; of an animation, its first frame."""
    try:
        with open(path, "rb") as file:
            image = Image.open(file, formats=("JPEG", "PNG", "WEBP"))
            if image.width * image.height <= MAX_PIXELS:
                image.load()
                return image
    except Image.DecompressionBombError:
        pass
    except Exception as error:  # Pillow promises no closed list for damaged files
        unknown = "it is not a JPEG, PNG or WebP image" if isinstance(error, UnidentifiedImageError) else None
        why = unknown or getattr(error, "strerror", None) or "it is damaged or truncated"
        raise RunnerError(f"{path} cannot be read: {why}") from error
    raise RunnerError(f"{path} has more than the {MAX_PIXELS // 10**6} megapixels allowed: scale it down first")


def prepare(image: Image.Image, preprocess: Mapping[str, Any]) -> np.ndarray:
    """An image to uint8 (H, W, 3), RGB: what gpt_serve/images does, with Pillow."""
    image = to_rgb(image, exif=preprocess["exif"])
    height, width = preprocess["input_size"]
    resample = Image.Resampling[preprocess["interpolation"].upper()]
    if preprocess["crop_mode"] == "squash":
        return np.asarray(image.resize((width, height), resample))
    cover = (math.floor(height / preprocess["crop_pct"]), math.floor(width / preprocess["crop_pct"]))
    ratio = min(image.height / cover[0], image.width / cover[1])
    longest = [math.ceil(side * ratio * MAX_STRETCH) for side in cover]
    # An even number of pixels goes, so that the centre stays where it is.
    kept = [min(side, most + (side - most) % 2) for side, most in zip(image.size[::-1], longest, strict=True)]
    image = crop(image, *kept)
    image = image.resize(covering_size(image.size, cover), resample)
    return np.asarray(crop(image, height, width))


def covering_size(size: tuple[int, int], cover: tuple[int, int]) -> tuple[int, int]:
    """The (w', h') that keeps the aspect ratio of (w, h) and just covers ``cover`` (h, w), rounded as timm does."""
    if cover[0] == cover[1]:
        return int(cover[0] * size[0] / min(size)), int(cover[0] * size[1] / min(size))
    ratio = min(size[0] / cover[1], size[1] / cover[0])
    return round(size[0] / ratio), round(size[1] / ratio)


def crop(image: Image.Image, height: int, width: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def to_rgb(image: Image.Image, *, exif: bool) -> Image.Image:
    """Upright, without transparency (on white), 16-bit grey as its high byte."""
    image.load()  # a PNG may have its EXIF behind the pixels
    orientation = read_orientation(image) if exif else 1
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        grey = (wide.clip(0, 65535) >> 8).astype(np.uint8)
        grey[wide == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(grey).convert("RGB")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    image = image.convert("RGB")
    return image.transpose(Image.Transpose[TURNS[orientation - 2]]) if 2 <= orientation <= 8 else image


def read_orientation(image: Image.Image) -> int:
    """The EXIF tag of a loaded image, 1 to 8, whatever its type; a photo whose EXIF is damaged is still a photo."""
    try:
        exif = Image.Exif()
        exif.load(image.info["exif"])
        value = exif.get(0x0112, 1)
        if isinstance(value, bytes | tuple):  # Pillow's form of type BYTE, and of several values
            value = value[0]
        return value if isinstance(value, int) else 1
    except Exception:
        return 1


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"run.py: {message}; try --help\n")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Classify images with an exported graph.")
    parser.add_argument("graph", help="what gpt-serve export wrote")
    parser.add_argument("images", nargs="+", help="JPEG, PNG or WebP")
    parser.add_argument("--task", help="needed for a multi-task graph")
    several = "5 without it, or where images have several labels all above their threshold"
    parser.add_argument("--top-k", type=int, metavar="K", help=f"answers per image, 1 to 1000; {several}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--providers", default=CPU, help="of onnxruntime, separated by commas, best first")
    options = parser.parse_args(arguments)
    if options.top_k is not None and not 1 <= options.top_k <= 1000:
        parser.error("--top-k must be 1 to 1000")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the answers; 1 if some images have none, 2 if no image has one, with a line on stderr for each mistake."""
    options = parse_arguments(arguments)
    warnings.simplefilter("ignore")  # Pillow's, on EXIF and sizes that are handled here
    ort.set_default_logger_severity(4)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # labels in any script, terminals in any encoding
    broken: dict[str, str] = {}
    try:
        model = Model(options.graph, [options.task] if options.task else (), options.providers.split(","))
        found = iter(model.predict(open_images(options.images, broken), options.task))
    except RunnerError as error:
        complain(str(error))
        return 2
    answers: list[dict[str, Any]] = []
    for path in options.images:
        if path in broken:
            complain(broken[path])
            answers.append({"image": path, "error": broken[path]})
            continue
        prediction = next(found)
        best = [{"label": label, "probability": value} for label, value in prediction.listed(options.top_k)]
        answer = {"image": path, "revision": prediction.task.revision, "predictions": best}
        if prediction.known is not None:
            answer |= {"known": prediction.known, "unknown": prediction.unknown}
        answers.append(answer)
    if len(broken) == len(set(options.images)):
        return 2
    show(answers, options.task or next(iter(model.tasks)), options.json)
    return 1 if broken else 0


def open_images(paths: Sequence[str], broken: dict[str, str]) -> Iterator[Image.Image]:
    """Those that can be opened; of the others, the reason goes to ``broken``, by path."""
    for path in paths:
        try:
            if path not in broken:
                yield open_image(path)
        except RunnerError as error:
            broken[path] = str(error)


def complain(text: str) -> None:
    print(f"run.py: {' '.join(text.splitlines())}", file=sys.stderr)


def show(answers: Sequence[Mapping[str, Any]], task: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"task": task, "images": answers}))
        return
    for answer in answers:
        if "error" not in answer:
            shown = ", ".join(f"{item['label']} {100 * item['probability']:.1f} %" for item in answer["predictions"])
            stranger = ", probably none of these" if answer.get("unknown") else ""
            print(f"{os.fsencode(answer['image']).decode(errors='replace')}: {shown}{stranger}")


if __name__ == "__main__":
    sys.exit(main())
