"""How good a frozen backbone's features are, and what they cost: linear discriminant analysis on image folders.

    python benchmarks/backbones/measure.py --backbone vit-small-14 --input-size 126 --input-size 224 --data DIR

Images are prepared as serving prepares them. ``last`` is the backbone's own pooling after the last block; ``four`` adds
the CLS tokens after the two blocks before and the mean of patches after the fourth from the end. Time is the
processor's, of one thread, in batches of 32; other programs on the machine disturb it less than the clock.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt_serve.images.decode import decode  # noqa: E402
from gpt_serve.images.preprocess import normalize, preprocess_image  # noqa: E402
from gpt_serve.model.backbone import Backbone  # noqa: E402
from gpt_serve.model.batch import AdapterBatch  # noqa: E402
from gpt_serve.model.prompted import embed, tapped_features  # noqa: E402
from gpt_serve.specs import Tap  # noqa: E402
from gpt_serve.train.data.datasets import open_dataset  # noqa: E402
from gpt_serve.train.data.samples import Sample  # noqa: E402

BATCH = 32


def taps(backbone: Backbone) -> tuple[Tap, ...]:
    """The backbone's own pooling first, then what ``four`` adds."""
    last, spec = backbone.spec.depth - 1, backbone.spec
    own = Tap(last, "patches" if spec.pool == "mean" else spec.pool)
    return (own, Tap(last - 1, "cls"), Tap(last - 2, "cls"), Tap(last - 3, "patches"))


@torch.inference_mode()
def features(backbone: Backbone, samples: Sequence[Sample]) -> tuple[np.ndarray, float]:
    """(n, 4, D), and seconds of one thread for an image."""
    spec, seconds, rows = backbone.spec, 0.0, []
    bare = AdapterBatch.single(depth=spec.depth, width=spec.width, pool=spec.pool, taps=taps(backbone))
    mean, std = torch.tensor(spec.preprocess.mean), torch.tensor(spec.preprocess.std)
    for start in range(0, len(samples), BATCH):
        pixels = [preprocess_image(decode(item.read()), spec.preprocess) for item in samples[start : start + BATCH]]
        images = normalize(torch.stack(pixels), mean, std)
        began = time.process_time()
        rows.append(torch.stack(tapped_features(backbone.model, embed(backbone.model, images), bare), dim=1))
        seconds += time.process_time() - began
    return torch.cat(rows).numpy(), seconds / len(samples)


def accuracy(train: np.ndarray, targets: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    """Per cent, of discriminant analysis with Ledoit and Wolf's shrinkage on standardised features."""
    model = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))
    return float(100 * model.fit(train, targets).score(test, truth))


def measure(backbone: Backbone, data: str) -> str:
    """A row of the table."""
    dataset = open_dataset(data, 0)
    splits = [dataset.train, list(dataset.test or dataset.val)]
    (train, _), (test, seconds) = (features(backbone, split) for split in splits)
    targets, truth = (np.array([sample.target for sample in split]) for split in splits)
    last, four = (
        accuracy(train[:, :count].reshape(len(train), -1), targets, test[:, :count].reshape(len(test), -1), truth)
        for count in (1, 4)
    )
    side = backbone.spec.preprocess.input_size[0]
    return f"| {backbone.name} | {side} | {Path(data).name} | {last:.1f} | {four:.1f} | {1000 * seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", action="append", required=True, help="bundled or timm name; repeat for more")
    parser.add_argument("--input-size", type=int, action="append", help="side in pixels; repeat for more")
    parser.add_argument("--data", action="append", required=True, help="image folder with train and test")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| backbone | input | data | last, % | four, % | ms an image |\n|---|---:|---|---:|---:|---:|", flush=True)
    for name in options.backbone:
        for side in options.input_size or [None]:
            backbone = Backbone.load(name, input_size=side)
            for data in options.data:
                print(measure(backbone, data), flush=True)


if __name__ == "__main__":
    main()
