"""Exported graphs against torch and against what ``torch.onnx.export`` makes of the model as it is written.

    python benchmarks/export/compare.py --backbone vit_small_patch16_224 --backbone vit_base_patch16_224

On the CPU; backbones that aren't bundled get random weights, which take the same time. Writes ``results.json`` and
``tables.md`` beside this file.
"""

import argparse
import contextlib
import dataclasses
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from plain import PlainGated
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.bench import report
from gpt_serve.bench.setting import untrained_adapter
from gpt_serve.bench.timing import Plan, Ratio, Row, interleave, to_rows
from gpt_serve.export.files import quantize, save
from gpt_serve.export.graphs import Form, single_graph
from gpt_serve.export.session import FORMAT, Graph
from gpt_serve.images.preprocess import normalize
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.catalog import TINY
from gpt_serve.model.prompted import embed, prompted_features

BATCHES = (1, 8)
PROMPTS = 50
HERE = Path(__file__).parent
COMMAND = "python benchmarks/export/compare.py"
NAIVE, TORCH, FOLDED, CLOSED, INT8 = "naive export", "torch eager", "folded", "folded, gates closed", "folded, int8"

Call = Callable[[Tensor], object]


def bench_export(backbone: Backbone, plan: Plan, batches: Sequence[int] = BATCHES, prompts: int = PROMPTS) -> list[Row]:
    """One comparison per batch size, on the CPU: uint8 pixels for the folded graphs, normalised ones for the others."""
    open_gates = untrained_adapter(backbone, "bench", "gated", prompts)
    closed = dataclasses.replace(open_gates, gamma=torch.full((backbone.spec.depth - 1,), float("-inf")))
    with TemporaryDirectory() as name:
        folder = Path(name)
        calls: dict[str, Call] = {NAIVE: _naive(backbone, open_gates, folder), TORCH: _eager(backbone, open_gates)}
        sizes = {NAIVE: _size(folder / "naive.onnx")}
        for variant, adapter in ((FOLDED, open_gates), (CLOSED, closed), (INT8, open_gates)):
            path = folder / f"{variant}.onnx"
            save(single_graph(backbone, adapter, Form()), path, {"format": FORMAT, "output": "probabilities"})
            if variant == INT8:
                quantize(path)
            sizes[variant] = _size(path)
            calls[variant] = _graph(path)
        rows: list[Row] = []
        for batch in batches:
            height, width = backbone.spec.preprocess.input_size
            images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
            variants = {variant: _on(call, images) for variant, call in calls.items()}
            times = interleave(variants, plan)
            extra = {variant: dict(sizes.get(variant, {})) for variant in times}
            for variant in (FOLDED, CLOSED, INT8):
                extra[variant]["speed by torch"] = Ratio.of(times[TORCH], times[variant]).median
                extra[variant]["speed by naive"] = Ratio.of(times[NAIVE], times[variant]).median
            extra[INT8]["speed by fp32"] = Ratio.of(times[FOLDED], times[INT8]).median
            rows += to_rows("export", backbone.name, f"batch {batch}, P = {prompts}", batch, times, extra)
        return rows


def _on(call: Call, images: Tensor) -> Callable[[], object]:
    return lambda: call(images)


def _eager(backbone: Backbone, adapter: Adapter) -> Call:
    """The forward pass as the torch engine runs it, with head and softmax."""
    tensors = AdapterBatch.of(adapter, backbone.spec, "cpu")
    normalized = _normalized(adapter)

    @torch.inference_mode()
    def run(images: Tensor) -> object:
        features = prompted_features(backbone.model, embed(backbone.model, normalized(images)), tensors)
        return torch.addmm(adapter.head_bias, features, adapter.head_weight.T).softmax(dim=1)

    return run


def _naive(backbone: Backbone, adapter: Adapter, folder: Path) -> Call:
    """``torch.onnx.export`` with its own defaults but for the dynamic batch, and onnxruntime with its own."""
    path = folder / "naive.onnx"
    example = torch.zeros(2, 3, *backbone.spec.preprocess.input_size)
    dynamic = {"images": {0: torch.export.Dim("batch")}}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        module = PlainGated(backbone, adapter).eval()
        torch.onnx.export(module, (example,), path, dynamic_shapes=dynamic, external_data=False, verbose=False)
    import onnxruntime as ort  # after gpt_serve, which switches its reports off

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the others run in between
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name, normalized = session.get_inputs()[0].name, _normalized(adapter)
    return lambda images: session.run(None, {name: normalized(images).numpy()})


def _graph(path: Path) -> Call:
    graph = Graph(path, threads=torch.get_num_threads())
    return lambda images: graph.probabilities({"images": np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())})


def _normalized(adapter: Adapter) -> Callable[[Tensor], Tensor]:
    mean, std = (torch.tensor([values]) for values in (adapter.preprocess.mean, adapter.preprocess.std))
    return lambda images: normalize(images, mean, std)


def _size(path: Path) -> Mapping[str, float]:
    model = onnx.load(path)
    return {"nodes": len(model.graph.node), "MB": path.stat().st_size / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", action="append", dest="backbones", help="repeat for more")
    parser.add_argument("--repeats", type=int, default=20, help="most rounds a comparison")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    machine = report.machine_facts("cpu") | {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime-gpu")}
    plan, records = Plan(options.repeats), []
    for name in options.backbones or [TINY.name, "vit_small_patch16_224", "vit_base_patch16_224"]:
        print(name, flush=True)
        rows = bench_export(Backbone.load(name, pretrained=False), plan, prompts=options.prompts)
        records.append(report.Record("export", name, machine, plan, rows))
    report.save(options.output, records, COMMAND)
    print(report.markdown(records, COMMAND))


if __name__ == "__main__":
    main()
