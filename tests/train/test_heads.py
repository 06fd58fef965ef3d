"""The head that training starts from, against scikit-learn's linear discriminant analysis."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import UsageError
from gpt_serve.images.preprocess import normalize
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.calibration import fit_temperature
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.data.samples import Sample
from gpt_serve.train.data.views import View, thinned
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import build_module, train_adapter
from gpt_serve.train.inputs import Inputs, normalized
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.methods import start
from gpt_serve.train.methods.heads import (
    ALIKE,
    FOLDS,
    SCALES,
    SHRINKAGES,
    Discriminant,
    HeadNorm,
    lda_head,
    left_out_logits,
)
from gpt_serve.train.methods.modules import TaskModule
from gpt_serve.train.methods.start import start_from_data
from gpt_serve.train.recipes.recipe import Recipe, make_recipe
from tests.tiny_vit import PREPROCESS
from tests.train.conftest import Recorder

WIDTH, CLASSES = 7, 3


def clouds(counts: tuple[int, ...], apart: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (n, D) of correlated classes in mixed order, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.cat([torch.full((count,), index) for index, count in enumerate(counts)])
    targets = targets[torch.randperm(len(targets), generator=generator)]
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    means = apart * torch.randn(len(counts), WIDTH, generator=generator)
    noise = torch.randn(len(targets), WIDTH, generator=generator) @ mixing
    return 5 + means[targets] + noise, targets


def standardised(features: Tensor) -> np.ndarray:
    rows = features.double().numpy()
    return np.asarray((rows - rows.mean(0)) / rows.std(0))


def analysis(shrinkage: float) -> LinearDiscriminantAnalysis:
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)


def posterior(fitted: LinearDiscriminantAnalysis, scale: float, rows: np.ndarray, priors: np.ndarray) -> np.ndarray:
    """Its probabilities, of the classes that it knows, with the evidence, but not the priors, times ``scale``."""
    evidence = rows @ fitted.coef_.T + fitted.intercept_ - np.log(fitted.priors_)
    logits = scale * evidence + np.log(priors[fitted.classes_])
    shares = np.zeros((len(rows), len(priors)))
    shares[:, fitted.classes_] = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(shares / shares.sum(1, keepdims=True))


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
def test_discriminant_is_scikit_learns(shrinkage: float) -> None:
    features, targets = clouds((20, 9, 14), apart=1.0)
    rows = standardised(features)
    expected = analysis(shrinkage).fit(rows, targets.numpy())
    weight, bias = Discriminant.fit(torch.from_numpy(rows), targets, CLASSES).head(shrinkage)
    np.testing.assert_allclose(weight.numpy(), expected.coef_, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), expected.intercept_ - np.log(expected.priors_), rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:Only one sample available")
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("counts", "apart"), [((40, 30, 50), 1.5), ((7, 5, 6), 1.0), ((60, 10, 20), 0.3), ((12, 1, 9), 1.0)]
)
def test_head_is_the_one_that_predicts_images_left_out_best(
    counts: tuple[int, ...], apart: float, seed: int, views: int
) -> None:
    """Every shrinkage and scale by scikit-learn, fold by fold; all views of an image at once, never a class's only."""
    features, one = clouds(counts, apart, seed)
    noise = torch.randn(views, *features.shape, generator=torch.Generator().manual_seed(seed))
    stacked = features + 0.3 * noise
    rows, labels = standardised(stacked.flatten(0, 1)), np.tile(one.numpy(), views)
    priors = np.bincount(labels) / len(labels)
    seen = [int((one[:index] == label).sum()) for index, label in enumerate(one)]
    fold = np.tile(np.array(seen) % FOLDS, views)
    judged = [np.flatnonzero((fold == index) & np.isin(labels, labels[fold != index])) for index in range(FOLDS)]
    losses = {}
    for shrinkage in SHRINKAGES:
        fitted = [analysis(shrinkage).fit(rows[fold != index], labels[fold != index]) for index in range(FOLDS)]
        for scale in SCALES:
            shares = np.concatenate([posterior(fitted[i], scale, rows[judged[i]], priors) for i in range(FOLDS)])
            right = shares[np.arange(len(shares)), labels[np.concatenate(judged)]]
            losses[shrinkage, scale] = -np.log(right).mean()
    good = [setting for setting, loss in losses.items() if loss <= min(losses.values()) + ALIKE]
    shrinkage, scale = sorted(good, key=lambda setting: (setting[0], -setting[1]))[-1]
    weight, bias = lda_head(stacked, one, CLASSES)
    expected = posterior(analysis(shrinkage).fit(rows, labels), scale, rows, priors)
    actual = (stacked.flatten(0, 1) @ weight.T + bias).softmax(1)
    np.testing.assert_allclose(actual.numpy(), expected, atol=2e-4)


def probabilities(head: tuple[Tensor, Tensor], features: Tensor) -> Tensor:
    return (features @ head[0].T + head[1]).softmax(1)


def test_what_says_nothing_is_not_trusted() -> None:
    """Features without a difference between classes: the probabilities of the head are about the priors."""
    features, targets = clouds((100, 50, 50), apart=0.0)
    shares = probabilities(lda_head(features[None], targets, CLASSES), features)
    torch.testing.assert_close(shares.mean(0), torch.tensor([0.5, 0.25, 0.25]), atol=0.05, rtol=0)
    assert shares.std(0).max() < 0.05


@pytest.mark.parametrize("each", [3, 5])
def test_a_few_images_that_are_told_apart_do_not_make_it_sure(each: int) -> None:
    """Many dimensions, few images: other images of the same classes get a loss that training can start from."""
    generator = torch.Generator().manual_seed(each)
    classes, width = 12, 192
    means = 0.7 * torch.randn(classes, width, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        targets = torch.arange(classes).repeat(count)
        return means[targets] + torch.randn(len(targets), width, generator=generator), targets

    features, targets = draw(each)
    head = lda_head(features[None], targets, classes)
    features, targets = draw(40)
    right = probabilities(head, features).gather(1, targets[:, None])
    assert -right.log().mean() < 1.0 and (right > 0.5).double().mean() > 0.8


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3])
def test_copies_of_an_image_do_not_make_it_sure(noise: float) -> None:
    """A class that hardly varies is taken for one that varies by a hundredth."""
    features, targets = clouds((1, 1, 1), apart=2.0)
    features, targets = features.repeat(3, 1), targets.repeat(3)
    features += noise * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    head = lda_head(features[None], targets, CLASSES)
    assert torch.equal(probabilities(head, features).argmax(1), targets)
    assert head[0].abs().max() < 50


def test_head_of_a_class_with_one_image_and_of_a_class_without() -> None:
    features, targets = clouds((6, 1, 6), apart=2.0)
    features[:, 3] = 1.0  # never varies
    head = lda_head(features[None], targets, CLASSES + 1)
    assert all(part.isfinite().all() for part in head)
    assert head[0].shape == (CLASSES + 1, WIDTH) and head[0][CLASSES].eq(0).all()
    assert (probabilities(head, features).argmax(1) == targets).double().mean() > 0.9


def test_two_images_a_class_are_enough() -> None:
    """Each of the images left out is judged by the other, by its distance."""
    features, targets = clouds((2, 2, 2), apart=9.0)
    head = lda_head(features[None], targets, CLASSES)
    assert torch.equal(probabilities(head, features).argmax(1), targets)
    rows = torch.from_numpy(standardised(features))
    means = torch.stack([rows[targets == index].mean(0) for index in range(CLASSES)])
    along = head[0].double() * torch.from_numpy(features.double().numpy().std(0))
    torch.testing.assert_close(F.normalize(along), F.normalize(means), atol=1e-3, rtol=1e-3)


def test_one_image_a_class_gives_the_nearest() -> None:
    features, targets = clouds((1, 1, 1), apart=2.0)
    shares = probabilities(lda_head(features[None], targets, CLASSES), features)
    assert torch.equal(shares.argmax(1), targets) and shares.max() < 0.6


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
def test_fewer_images_than_features_have_the_same_head(shrinkage: float) -> None:
    """By their own small matrix, against the equation of the module's docstring."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(40) % 5
    rows = (torch.randn(40, 90, generator=generator) + 2 * torch.randn(5, 90, generator=generator)[targets]).double()
    rows -= rows.mean(0)
    means = torch.stack([rows[targets == label].mean(0) for label in range(5)])
    within = rows - means[targets]
    covariance = within.T @ within / len(rows)
    level = covariance.diagonal().mean()
    shrunk = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(90).double()
    expected = torch.linalg.solve(shrunk, means.T).T
    weight, bias = Discriminant.fit(rows, targets, 5).head(shrinkage)
    torch.testing.assert_close(weight, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(bias, -(means * expected).sum(1) / 2, atol=1e-8, rtol=1e-8)


def test_images_are_left_out_of_the_head_that_judges_them() -> None:
    """Of features that mean nothing a head remembers nearly all, and knows nothing of what it has not seen."""
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(1, 60, 200, generator=generator), torch.arange(60) % 3
    weight, bias = lda_head(features, targets, 3)
    assert ((features[0] @ weight.T + bias).argmax(1) == targets).double().mean() > 0.9
    right = left_out_logits(features, targets, 3).argmax(1) == targets
    assert right.double().mean() < 0.5
    told, classes = clouds((30, 30, 30), apart=3.0)
    views = torch.stack([told, told + 0.01])
    right = left_out_logits(views, classes, CLASSES).argmax(1) == classes
    assert right.double().mean() > 0.8


def test_a_refit_takes_validation_images_too(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    """The published head is that of all images, at the temperature that the head of the training images asked for."""
    for refit in (False, True):
        recipe = make_recipe("instant", taps="last", refit=refit)
        train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path / str(refit), recipe), Recorder(), World())
    apart, adapter = (AdapterStore(tmp_path / str(refit)).load("colours").adapter for refit in (False, True))
    for name in ("val_accuracy", "val_loss"):  # of the head that has not seen those images
        assert apart.training["metrics"][name] == adapter.training["metrics"][name]
    dataset = open_dataset(str(colours), 0)
    samples = [*dataset.train, *dataset.val]
    view = View(samples, PREPROCESS, None, "none", 0)
    images = normalized(torch.stack([view[index][0] for index in range(len(view))]), PREPROCESS)
    features = build_module(tiny, make_recipe("instant"), 3).features(tiny.model, images).detach()
    norm = HeadNorm(24)
    norm.set_standard([features])
    targets = torch.tensor([sample.target for sample in samples])
    weight, bias = lda_head(norm(features)[None], targets, 3)
    temperature = fit_temperature(left_out_logits(norm(features)[None], targets, 3), targets)
    assert adapter.training["calibration"]["temperature"] == pytest.approx(temperature, rel=1e-3)
    head = nn.Linear(24, 3)
    with torch.no_grad():
        head.weight.copy_(weight / temperature)
        head.bias.copy_(bias / temperature)
    for ours, expected in zip((adapter.head_weight, adapter.head_bias), norm.folded(head), strict=True):
        torch.testing.assert_close(ours, expected.detach(), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(apart.head_weight, adapter.head_weight, atol=1e-2)


@pytest.mark.parametrize("settings", [{"head_init": "small"}, {"final_fit": True}])
def test_what_cannot_be_refitted(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--refit goes with --head-init lda and without --final-fit"):
        make_recipe("lda", refit=True, **settings)


def started(backbone: Backbone, recipe: Recipe, view: View, tmp_path: Path) -> tuple[TaskModule, Recorder]:
    module, recorder = build_module(backbone, recipe, 3).eval(), Recorder()
    start_from_data(
        backbone, module, TrainingJob("colours", "", tmp_path, recipe, workers=0), view, Inputs(0), recorder
    )
    return module, recorder


@pytest.fixture
def view(colours: Path) -> View:
    return View(open_dataset(str(colours), 0).train, PREPROCESS, None, "crop-flip", 0)


@pytest.mark.parametrize(
    ("method", "norm", "augment"),
    [
        ("gated", "standard", "crop-flip"),
        ("linear", "pretrained", "none"),
        ("vpt-deep", "fresh", "crop"),
        ("full", "pretrained", "crop-flip"),
    ],
)
def test_training_starts_from_it(
    tiny: Backbone, view: View, tmp_path: Path, method: str, norm: str, augment: str
) -> None:
    """By the module as it starts, behind its norm, from each image and views of it that training does not come to."""
    prompts = None if method == "full" else 3
    recipe = make_recipe("adamw", method=method, norm=norm, head_init="lda", prompts=prompts, augment=augment, epochs=4)
    module, _ = started(tiny, recipe, view, tmp_path)
    plain = View(view.samples, PREPROCESS, None, "none", 0)
    views = [plain]
    for epoch in range(4, 7) if augment != "none" else ():
        views.append(View(view.samples, PREPROCESS, None, "crop" if augment == "crop" else "crop-flip", 0))
        views[-1].epoch = epoch
    mean, std = torch.tensor(PREPROCESS.mean), torch.tensor(PREPROCESS.std)
    targets = torch.tensor([sample.target for sample in view.samples])
    with torch.no_grad():
        features = []
        for each in views:
            images = torch.stack([each[index][0] for index in range(len(each))])
            features.append(module.features(tiny.model, normalize(images, mean, std)))
        logits = module.head(module.seen(features[0]))
    weight, bias = lda_head(torch.stack(features), targets, 3)
    torch.testing.assert_close(logits, features[0] @ weight.T + bias, atol=1e-3, rtol=1e-3)
    assert (logits.argmax(1) == targets).double().mean() > 0.9
    if norm == "standard":
        torch.testing.assert_close(module.seen(features[0]).var(0, unbiased=False), torch.ones(24), atol=1e-2, rtol=0)


def numbered(targets: list[int]) -> View:
    """A view of which only names and classes are looked at."""
    samples = [Sample(str(index), bytes, target) for index, target in enumerate(targets)]
    return View(samples, PREPROCESS, None, "none", 0)


@pytest.mark.parametrize("targets", [[index % 10 for index in range(3000)], sorted([0] * 2700 + [1] * 297 + [2] * 3)])
@pytest.mark.parametrize("most", [100, 1501, 2999])
def test_some_of_many_images_are_of_every_class_in_proportion(targets: list[int], most: int) -> None:
    view = numbered(targets)
    some = thinned(view, most)
    assert len(some) == most and len({sample.name for sample in some.samples}) == most
    counts, all_counts = (np.bincount([sample.target for sample in each.samples]) for each in (some, view))
    assert counts.min() >= 1
    np.testing.assert_allclose(counts, all_counts * most / len(view), atol=1.5)
    assert thinned(view, 3000) is view


def test_of_many_images_some_are_read(
    tiny: Backbone, view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("adamw", method="linear", norm="standard", head_init="lda")
    expected, _ = started(tiny, recipe, thinned(view, 7), tmp_path)
    monkeypatch.setattr(start, "MOST_FEATURES", 28)
    module, _ = started(tiny, recipe, view, tmp_path)
    assert torch.equal(module.head.weight, expected.head.weight)
