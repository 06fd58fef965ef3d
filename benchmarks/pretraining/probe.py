"""How good frozen features are: nearest neighbours and a linear probe on labelled images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from gpt_serve.errors import DataError, ImageError
from gpt_serve.images.decode import LOCAL_LIMITS, decode
from gpt_serve.images.preprocess import normalize, preprocess_image
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.catalog import TINY
from gpt_serve.model.prompted import embed, prompted_features
from gpt_serve.train.data.datasets import Sample, open_dataset

NEIGHBOURS = 10
STRENGTHS = tuple(10.0**power for power in range(-3, 2))
CHUNK = 256

Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Score:
    """Accuracies in [0, 1] on ``images`` test images; ``strength`` is the probe's C that validation chose."""

    neighbours: float
    probe: float
    strength: float
    images: int

    def cells(self) -> list[str]:
        """k-NN and probe in per cent, with the standard error of that many images."""
        shares = (self.neighbours, self.probe)
        return [f"{100 * p:.1f} ± {100 * math.sqrt(p * (1 - p) / self.images):.1f}" for p in shares]


def score(backbone: Backbone, source: str, seed: int = 0) -> Score:
    """Classify the test images of ``source`` by the backbone's features.

    Features are standardised for both. The probe's C is chosen on validation data; then both learn from train and
    validation data.

    Raises:
        DataError: ``source`` is no image folder with a test split, or an image cannot be read.
    """
    dataset = open_dataset(source, seed)
    if not dataset.test:
        raise DataError(f"--data {source}: expected a folder test/ with one folder per class")
    train, val, test = (_labelled(backbone, split) for split in (dataset.train, dataset.val, dataset.test))
    # The first of equals is the most regularised.
    strength = max(STRENGTHS, key=lambda c: _probe(c).fit(*train).score(*val))
    known = np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]])
    neighbours = make_pipeline(StandardScaler(), KNeighborsClassifier(NEIGHBOURS, metric="cosine"))
    accuracies = [classifier.fit(*known).score(*test) for classifier in (neighbours, _probe(strength))]
    return Score(*accuracies, strength, len(dataset.test))


def _probe(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000))


def _labelled(backbone: Backbone, samples: Sequence[Sample]) -> Labelled:
    chunks = [samples[start : start + CHUNK] for start in range(0, len(samples), CHUNK)]
    rows = [features(backbone, torch.stack([_read(sample, backbone) for sample in chunk])) for chunk in chunks]
    return torch.cat(rows).numpy(), np.array([sample.target for sample in samples])


@torch.inference_mode()
def features(backbone: Backbone, images: Tensor) -> Tensor:
    """Pooled features of uint8 (B, 3, H, W), as adapters without prompts get them: float32 (B, D) on the host."""
    spec, device = backbone.spec, backbone.device
    mean, std = (torch.tensor(value, device=device) for value in (spec.preprocess.mean, spec.preprocess.std))
    bare = AdapterBatch.single(depth=spec.depth, width=spec.width, pool=spec.pool, device=device)
    tokens = embed(backbone.model, normalize(images.to(device), mean, std))
    return prompted_features(backbone.model, tokens, bare).float().cpu()


def _read(sample: Sample, backbone: Backbone) -> Tensor:
    try:
        return preprocess_image(decode(sample.read(), LOCAL_LIMITS), backbone.spec.preprocess)
    except (ImageError, OSError) as error:
        raise DataError(f"cannot read {sample.name}: {error}") from error


def compare(checkpoints: Sequence[Path | None], sources: Sequence[str], device: str) -> list[str]:
    """A Markdown table of test accuracies: a line for each set of weights, k-NN and probe for each of ``sources``.

    Args:
        checkpoints: files of the bundled architecture; None for the bundled weights.

    Raises:
        CheckpointError, DataError: one line for the user.
    """
    heads = [f"{Path(source).name}, {kind}" for source in sources for kind in (f"k-NN ({NEIGHBOURS})", "linear probe")]
    lines = [["weights", *heads], ["---", *["---:"] * len(heads)]]
    for path in checkpoints:
        backbone = Backbone.load(TINY.name, checkpoint=path, device=device)
        cells = [cell for source in sources for cell in score(backbone, source).cells()]
        lines.append([f"{path or 'bundled'} ({backbone.fingerprint[:12]})", *cells])
    return [f"| {' | '.join(line)} |" for line in lines]
