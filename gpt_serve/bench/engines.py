"""What runs the forward pass faster: torch against onnxruntime, through the engine, on the same adapters and images."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.inputs import photo
from gpt_serve.bench.mixed import UNLIKE, answer, publish
from gpt_serve.bench.timing import Plan, Row, interleave, to_rows
from gpt_serve.engine.build import faster_forward
from gpt_serve.engine.engine import Engine
from gpt_serve.images.decode import decode
from gpt_serve.images.preprocess import preprocess_image
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.catalog import BUNDLED

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CLOSED = ("vpt-deep", 100)  # what torch computes in both engines: no row of prompts behind closed gates
CLOSED_BATCHES = (1, 8, 32)


def bench_engines(backbone: Backbone, plan: Plan, batches: Sequence[int] = BATCHES) -> list[Row]:
    """Comparisons for each batch size, on scaled images: one task, as many as images, one with closed gates."""
    most = max(batches)
    pixels = [preprocess_image(decode(photo(seed)), backbone.spec.preprocess) for seed in range(most)]
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        store = AdapterStore(folder / "adapters", backbone.spec)
        tasks = publish(backbone, store, "any", UNLIKE, most)
        closed = publish(backbone, store, "closed", [CLOSED], 1)
        engines = {
            "torch": Engine(backbone, store, max_batch=most),
            "onnxruntime": onnx_engine(backbone, store, folder, max_batch=most),
        }
        for batch in batches:
            kinds = {"one task": tasks[:1] * batch}
            if batch > 1:
                kinds[f"{batch} tasks, methods and P mixed"] = tasks[:batch]
            if batch in CLOSED_BATCHES:
                kinds["one task, {}, P = {}".format(*CLOSED)] = closed * batch
            for kind, chosen in kinds.items():
                requests = list(zip(chosen, pixels, strict=False))
                variants: dict[str, Callable[[], None]] = {
                    engine: partial(answer, engines[engine], requests) for engine in engines
                }
                times = interleave(variants, plan)
                rows += to_rows("engines", backbone.name, f"batch {batch}, {kind}", batch, times)
    return rows


def onnx_engine(backbone: Backbone, store: AdapterStore, folder: Path, max_batch: int) -> Engine:
    """An engine on onnxruntime where that is faster than torch, as ``gpt-serve serve --engine onnx`` has it.

    Graphs of random weights are kept in ``folder``, as a server would with it for ``XDG_CACHE_HOME``: nobody needs them
    again.
    """
    kept = None if backbone.name in BUNDLED else folder / "gpt-serve"
    return Engine(backbone, store, max_batch=max_batch, forward=faster_forward(backbone, kept))
