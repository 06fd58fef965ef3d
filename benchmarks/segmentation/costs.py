"""What segmentation rows cost in a batch, as ratios within rounds in which variants take turns.

    python benchmarks/segmentation/costs.py

32 rows of 126 px on vit-small-14: all for ``flowers``; half of them for ``camvid``; all for ``camvid``. Every image is
one input (``squash``). Masks are computed to the size of the image, 240 x 180. Writes ``costs.json`` beside this file.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.timing import Plan, Ratio, interleave
from gpt_serve.engine.engine import Engine
from gpt_serve.engine.malloc import reuse_freed_memory
from gpt_serve.engine.segment import Segmentation
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.catalog import SMALL

ADAPTERS = Path(__file__).parents[2] / "adapters"
ROWS = 32


def engine_of(folder: Path) -> Engine:
    """The shipped adapters, with a whole image in one input for both."""
    store = AdapterStore(folder)
    store.publish(AdapterStore(ADAPTERS).load("flowers").adapter)
    camvid = AdapterStore(ADAPTERS / "segmentation").load("camvid").adapter
    store.publish(dataclasses.replace(camvid, preprocess=dataclasses.replace(camvid.preprocess, crop_mode="squash")))
    return Engine(Backbone.load(SMALL.name), store)


def batches(engine: Engine) -> dict[str, Callable[[], object]]:
    """The three batches; the pictures are decoded already."""
    noise = np.random.default_rng(0).integers(0, 256, (ROWS, 3, 180, 240), dtype=np.uint8)
    images = list(torch.from_numpy(noise))

    def answer(masks: int) -> None:
        tasks = ["camvid"] * masks + ["flowers"] * (ROWS - masks)
        for result in engine.predict(list(zip(tasks, images, strict=True))):
            if isinstance(result, Segmentation):
                result.mask  # noqa: B018 computed when it is asked for

    return {f"{masks} of {ROWS} masks": lambda masks=masks: answer(masks) for masks in (0, ROWS // 2, ROWS)}


def main() -> None:
    reuse_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        seconds = interleave(batches(engine_of(Path(folder))), Plan(repeats=7))
    base = f"0 of {ROWS} masks"
    found = {name: dataclasses.asdict(Ratio.of(times, seconds[base])) for name, times in seconds.items()}
    text = json.dumps(found, indent=1)
    Path(__file__).with_name("costs.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
