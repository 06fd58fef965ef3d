"""Which score tells images of a task from strangers, and what the adapters that ship make of them.

    python benchmarks/unknown/measure.py --adapters adapters/vit-small-14 --task flowers \
        --data ../shared/data/flowers12 --strangers ../shared/data/caltech101/test ../shared/data/camvid/images/test \
        digits noise

Scores are fitted to the images of ``train`` (those that validation does not take) as the head of the adapter reads
them, and judged by the area under the ROC curve of test images against each kind of strangers. ``shipped`` is what the
adapter itself says, through the engine. Prints a Markdown table.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.images.convert import SUFFIXES, read_image
from gpt_serve.images.decode import LOCAL_LIMITS, decode
from gpt_serve.images.preprocess import preprocess_image
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.heads import stranger_distance
from gpt_serve.model.prompted import embed, prompted_features
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.data.samples import Split
from gpt_serve.train.inputs import normalized
from gpt_serve.train.strangers import gaussian

SHRINKAGE = 0.1
Score = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--backbone", default="vit-small-14")
    parser.add_argument("--strangers", nargs="+", required=True)
    parser.add_argument("--most", type=int, default=250, help="strangers of a kind, and test images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    backbone = Backbone.load(options.backbone)
    store = AdapterStore(options.adapters, backbone.spec)
    adapter = store.load(options.task).adapter
    data = open_dataset(options.data, int(adapter.training["recipe"]["seed"]))
    images = {"test": _spread(data.test, options.most)}
    images |= {Path(kind).name: strangers(kind, options.most) for kind in options.strangers}
    with Engine(backbone, store, limits=LOCAL_LIMITS) as engine:
        known = {name: _known(engine, options.task, files) for name, files in images.items()}

    batch = AdapterBatch.of(adapter, backbone.spec, "cpu")

    @torch.inference_mode()
    def features(files: list[bytes]) -> Tensor:
        parts = []
        for start in range(0, len(files), 32):
            pixels = [decode(file, LOCAL_LIMITS, exif=True) for file in files[start : start + 32]]
            ready = torch.stack([preprocess_image(image, adapter.preprocess) for image in pixels])
            tokens = embed(backbone.model, normalized(ready, adapter.preprocess))
            parts.append(prompted_features(backbone.model, tokens, batch))
        return torch.cat(parts).double()

    train = features([sample.read() for sample in data.train])
    targets = torch.tensor([sample.target for sample in data.train])
    scores = fitted(train, targets, adapter.head_weight.double(), adapter.head_bias.double())
    rows = {name: features(files) for name, files in images.items()}
    kinds = [name for name in images if name != "test"]
    print(f"| score | {' | '.join(kinds)} |\n|---{'|---' * len(kinds)}|")
    for name, score in scores.items():
        print(_line(name, {kind: score(own).tolist() for kind, own in rows.items()}, kinds))
    print(_line("shipped", {kind: [-share for share in shares] for kind, shares in known.items()}, kinds))
    called = [f"{100 * sum(share < 0.05 for share in shares) / len(shares):.0f} %" for shares in known.values()]
    print(f"\ncalled unknown: {', '.join(f'{kind} {share}' for kind, share in zip(images, called, strict=True))}")


def strangers(kind: str, most: int) -> list[bytes]:
    """Files of ``digits``, of noise, or of a folder."""
    if kind == "digits":
        return _spread(open_dataset("digits", 0).test, most)
    if kind == "noise":
        return _noise()
    paths = sorted(path for path in Path(kind).rglob("*") if path.suffix.lower() in SUFFIXES)
    return [read_image(path) for path in paths[:: max(1, len(paths) // most)]]


def _spread(split: Split, most: int) -> list[bytes]:
    return [split[index].read() for index in range(0, len(split), max(1, len(split) // most))]


def _noise() -> list[bytes]:
    """Noise of single pixels, of blocks, and plain colours, as PNG files."""
    rng, files = np.random.default_rng(0), []
    for side in [126] * 60 + [9] * 60 + [1] * 30:
        small = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((140, 140)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def _known(engine: Engine, task: str, files: list[bytes]) -> list[float]:
    answers = engine.predict([(task, file) for file in files])
    return [answer.known for answer in answers if isinstance(answer, Prediction) and answer.known is not None]


def fitted(train: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Score]:
    """Scores by name: the larger, the stranger. All but those of the head see features of variance 1."""
    mean, scale = train.mean(0), (train.var(0) + 1e-6).rsqrt()

    def at_one(rows: Tensor) -> Tensor:
        return (rows - mean) * scale

    own = at_one(train)
    means = torch.stack([own[targets == target].mean(0) for target in range(len(bias))])
    within, total = own - means[targets], own
    inner, outer = _whitening(within), _whitening(total)
    discriminant = torch.linalg.svd((means @ inner).T, full_matrices=False)[0][:, : min(len(bias) - 1, 64)]
    space = inner @ discriminant
    neighbours = NearestNeighbors(n_neighbors=1).fit(own.numpy())

    def nearest_mean(rows: Tensor, into: Tensor) -> Tensor:
        return torch.cdist(at_one(rows) @ into, means @ into).min(1).values.square()

    mean32, scale32, basis32 = gaussian(train.float())
    return {
        "energy": lambda rows: -torch.logsumexp(rows @ weight.T + bias, 1),
        "largest logit": lambda rows: -(rows @ weight.T + bias).max(1).values,
        "largest probability": lambda rows: -(rows @ weight.T + bias).softmax(1).max(1).values,
        "nearest mean": lambda rows: nearest_mean(rows, torch.eye(len(mean), dtype=torch.float64)),
        "nearest mean, discriminant space": lambda rows: nearest_mean(rows, space),
        "nearest training image": lambda rows: torch.from_numpy(neighbours.kneighbors(at_one(rows).numpy())[0][:, 0]),
        "Mahalanobis, by class": lambda rows: nearest_mean(rows, inner),
        "Mahalanobis, relative": lambda rows: nearest_mean(rows, inner) - (at_one(rows) @ outer).square().sum(1),
        "Mahalanobis, of all": lambda rows: (at_one(rows) @ outer).square().sum(1),
        "32 principal components (ours)": lambda rows: stranger_distance(rows.float(), mean32, scale32, basis32),
    }


def _whitening(rows: Tensor) -> Tensor:
    """(D, D) that gives centred rows the identity as covariance, which is shrunk towards its level."""
    covariance = rows.T @ rows / len(rows)
    level = covariance.diagonal().mean() * torch.eye(len(covariance), dtype=rows.dtype)
    return torch.linalg.inv(torch.linalg.cholesky((1 - SHRINKAGE) * covariance + SHRINKAGE * level)).T


def _line(name: str, scores: dict[str, list[float]], kinds: list[str]) -> str:
    areas = [
        roc_auc_score([0] * len(scores["test"]) + [1] * len(scores[kind]), scores["test"] + scores[kind])
        for kind in kinds
    ]
    return f"| {name} | {' | '.join(f'{area:.3f}' for area in areas)} |"


if __name__ == "__main__":
    main()
