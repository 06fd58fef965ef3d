"""The engine's forward pass in onnxruntime, and the graph that it runs.

The graph takes every adapter with prompts for the first block. It is built once per backbone and kept in
``$XDG_CACHE_HOME/gpt-serve``, by default ``~/.cache/gpt-serve``, which may be deleted at any time.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime as ort
import torch
from torch.nn import functional as F

from gpt_serve import __version__
from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import Signature
from gpt_serve.engine.bank import Resident
from gpt_serve.engine.classify import classify
from gpt_serve.engine.engine import Features, Row, TorchForward, distinct, normalized
from gpt_serve.engine.passes import PassPlanner, opened
from gpt_serve.engine.slab import SHIFTS, Packed, Slab, gather
from gpt_serve.errors import ExportError
from gpt_serve.export.session import FORMAT, Graph, serving_taps
from gpt_serve.files import cache_folder, locked
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import Layout
from gpt_serve.specs import BackboneSpec, Pool, Tap

logger = logging.getLogger("gpt_serve.engine")

TOLERANCE = 1e-5  # of probabilities
_UNFINISHED = ".new-"  # beginning of the name of a folder that a graph is made in
SAMPLE_ROWS = 64  # of a slab: enough for the samples without their shifts
TORCH_BELOW = 0.8
"""Share of a pass's work that torch must be able to leave out for closed gates, or else onnxruntime is faster."""


class OnnxForward:
    """Computes passes of prompts that enter the first block with a graph from `serving_graph`.

    Args:
        graph: open on the bank's device.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> Features:
        """The features of one or more rows, in order."""
        layout = Layout.joined([row.resident.place.layout for row in rows])
        index: list[int] | None = None
        if layout.trunk > layout.last:  # no task touches any block: an image is computed once for all of its tasks
            rows, index = distinct(rows)
        adapter = gather([row.resident.place for row in rows])
        count, depth, width = len(rows), adapter.gate.shape[1] + 1, adapter.prompt.shape[-1]
        inputs = {
            "images": normalized(rows, torch.device("cpu")),
            "prompt": F.pad(adapter.prompt, (0, 0, 0, max(0, 1 - adapter.prompts))).expand(count, -1, -1, -1),
            "counts": torch.full((1,), adapter.prompts) if adapter.counts is None else adapter.counts,
            "gate": adapter.gate,
            "tau": torch.ones(1, depth) if adapter.tau is None else adapter.tau,
            "shift": torch.zeros(1, depth, SHIFTS, width) if adapter.shift is None else adapter.shift,
        }
        whole = {name: value.expand(count, *value.shape[1:]).cpu().numpy() for name, value in inputs.items()}
        features = torch.from_numpy(self.graph.run(whole)).to(adapter.gate.device)
        features = features if index is None else features[index]
        outputs = _outputs(depth)
        return Features(layout.taps, tuple(features[:, outputs[tap]] for tap in layout.taps))


class FasterForward:
    """Chooses for each pass: torch leaves out rows behind closed gates, onnxruntime is faster at what is left.

    The graph takes prompts that enter the first block only, and has the features of `serving_taps`; with others it is
    always torch.
    """

    def __init__(self, onnx: OnnxForward, torch: TorchForward, planner: PassPlanner) -> None:
        self.onnx, self.torch, self.planner = onnx, torch, planner

    def __call__(self, rows: Sequence[Row]) -> Features:
        """The features of one or more rows, in order."""
        layout = Layout.joined([row.resident.place.layout for row in rows])
        images = len({id(row.image) for row in rows})
        computed = images if layout.trunk > layout.last else len(rows)
        by_graph = computed * self.planner.image(opened(layout))
        share = self.planner.rows(layout, len(rows), images) / by_graph
        served = _outputs(len(layout.closed) + 1).keys() >= set(layout.taps)
        by_torch = layout.layers > 1 or layout.first_block > 0 or not served or share < TORCH_BELOW
        return (self.torch if by_torch else self.onnx)(rows)


@cache
def _outputs(depth: int) -> dict[Tap, int]:
    """Which of a serving graph's features belong to which tap."""
    return {tap: index for index, tap in enumerate(serving_taps(depth))}


def serving_graph(backbone: Backbone, device: str = "cpu", folder: Path | None = None) -> Graph:
    """The backbone's serving graph, open on ``device``; built the first time, which takes seconds.

    A kept graph is used only if it answers on the CPU as torch does, which is tried each time; a damaged or outdated
    one is built again. What another device computes with it is not compared: of a session for CUDA only its placement
    is checked. Several processes may ask at the same time.

    Args:
        backbone: on the CPU.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        folder: where graphs are kept; None for the user's cache.

    Raises:
        ExportError: the graph does not answer on the CPU as torch does, or would not run on ``device``.
    """
    try:
        return _from(folder or cache_folder(), backbone, device)
    except OSError as error:
        logger.warning(
            "the ONNX graph cannot be kept (%s: %s) and is built at every start: let XDG_CACHE_HOME name another place",
            error.filename or "cache",
            error.strerror,
        )
    with TemporaryDirectory(prefix="gpt-serve-") as temporary:
        return _from(Path(temporary), backbone, device)


def file_name(spec: BackboneSpec) -> str:
    """Return the graph's file name, which says from what it was made and by which versions."""
    height, width = spec.preprocess.input_size
    made_by = f"{__version__}-torch-{torch.__version__}-onnxruntime-{ort.__version__}"
    return f"{spec.fingerprint[:16]}-{height}x{width}-gpt-serve-{made_by}.onnx"


def _from(folder: Path, backbone: Backbone, device: str) -> Graph:
    """Raises `OSError` when there is no graph in ``folder`` and none can be put there."""
    path = folder / file_name(backbone.spec)
    graph = _kept(path, backbone) if os.path.exists(path) else None
    if graph is None:
        graph = _build(path, backbone)
    return graph if device == "cpu" else Graph(path, device)


def _kept(path: Path, backbone: Backbone) -> Graph | None:
    try:
        return _open(path, backbone)
    except Exception:  # onnxruntime's exceptions share no base but this
        logger.warning("the ONNX graph %s is damaged or outdated", path, exc_info=logger.isEnabledFor(logging.DEBUG))
        return None


def _build(path: Path, backbone: Backbone) -> Graph:
    """Make the graph and move it into place once it has proved itself.

    Processes that start together make it once, one after another; what a killed one left unfinished is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    useless = _identity(path)
    with locked(path.parent / ".building.lock"):
        if _identity(path) != useless and (graph := _kept(path, backbone)) is not None:
            return graph  # another process made it meanwhile
        for unfinished in path.parent.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(unfinished, ignore_errors=True)  # without its maker: that would hold the lock
        return _build_alone(path, backbone)


def _identity(path: Path) -> tuple[int, int] | None:
    """Another one for each file that is moved to ``path``; None while there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _build_alone(path: Path, backbone: Backbone) -> Graph:
    with TemporaryDirectory(prefix=_UNFINISHED, dir=path.parent) as name:
        logger.info("building the ONNX graph of %s, which takes seconds; it is kept in %s", backbone.name, path.parent)
        from gpt_serve.export.files import publish, save
        from gpt_serve.export.graphs import features_graph  # seconds and 100 MB, not needed again

        staged = Path(name) / path.name
        save(features_graph(backbone), staged, _metadata(backbone.spec))
        graph = _open(staged, backbone)
        publish(staged.parent, path)
    return graph


def _metadata(spec: BackboneSpec) -> dict[str, str]:
    return {
        "format": FORMAT,
        "kind": "serving",
        "backbone": spec.name,
        "backbone_sha256": spec.fingerprint,
        "input": "float",
        "output": "features",
        "precision": "fp32",
    }


def _open(path: Path, backbone: Backbone) -> Graph:
    """The graph on the CPU, with as many threads as torch would use, compared with torch on noise.

    Raises:
        ExportError: it differs by more than `TOLERANCE`.
    """
    graph = Graph(path, threads=torch.get_num_threads())
    rows = _samples(backbone)
    for batch in (rows, rows[:1]):
        residents = [row.resident for row in batch]
        expected, actual = (
            classify(forward(batch), residents) for forward in (TorchForward(backbone), OnnxForward(graph))
        )
        difference = max(
            float((one.probabilities - other.probabilities).abs().max())
            for one, other in zip(expected, actual, strict=True)
        )
        if not difference <= TOLERANCE:
            raise ExportError(
                f"the ONNX graph of {backbone.name} does not answer as torch does (probabilities differ by up to "
                f"{difference:.2g}): use --engine torch"
            )
    return graph


def _samples(backbone: Backbone) -> list[Row]:
    """Noise for random adapters of either pooling: gated prompts and shifts, prompts without gates, none at all."""
    spec, generator = backbone.spec, torch.Generator().manual_seed(0)
    depth, width = spec.depth, spec.width
    other: Pool = "cls" if backbone.model.has_class_token else "mean"

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gated = {"prompt": noise(1, 3, width), "gamma": noise(depth - 1), "tau": noise(depth).exp()}
    gated["shift"] = 0.1 * noise(depth, SHIFTS, width)
    kinds: list[tuple[Pool, dict[str, Any]]] = [
        ("mean", gated),
        (other, {"prompt": noise(1, 2, width)}),
        ("mean", {}),
    ]
    slab = Slab(spec, (SAMPLE_ROWS + SHIFTS * depth) * 4 * width, "cpu")
    rows = []
    for classes, (pool, tensors) in enumerate(kinds, start=3):
        adapter = Adapter(
            task=f"sample-{classes}",
            method="sample",
            backbone=spec.name,
            backbone_sha256=spec.fingerprint,
            labels=tuple(str(number) for number in range(classes)),
            pool=pool,
            preprocess=replace(spec.preprocess, mean=(0.1 * classes,) * 3),
            training={},
            created="",
            head_weight=noise(classes, width) / width**0.5,
            head_bias=noise(classes),
            **tensors,
        )
        pixels = 256 * torch.rand(3, *spec.preprocess.input_size, generator=generator)
        rows.append(Row(_resident(slab, adapter, spec), pixels.to(torch.uint8)))
    return rows


def _resident(slab: Slab, adapter: Adapter, spec: BackboneSpec) -> Resident:
    packed = Packed.of(adapter, spec)
    place = slab.reserve(packed, remembered=0)
    assert place is not None
    slab.write(place, packed)
    return Resident(adapter.task, "", adapter.labels, adapter.preprocess, Signature(0, ""), None, None, place)
