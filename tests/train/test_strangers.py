"""What tells strangers: fitted to training images, measured with validation images."""

from pathlib import Path

import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.metrics import roc_auc_score

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.adapters.unknown import LEAST_KNOWN, known_share
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.heads import stranger_distance
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import Silent, TrainingJob
from gpt_serve.train.recipes.recipe import make_recipe
from gpt_serve.train.strangers import DIRECTIONS, EACH, gaussian, knots_of

RECIPE = make_recipe("adamw", method="linear", epochs=0, warmup=0, head_init="lda")


pytestmark = pytest.mark.usefixtures("no_plots")


def rows(count: int, width: int, directions: int, seed: int = 0) -> torch.Tensor:
    """Gaussian features with ``directions`` wide directions and noise in all."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(directions, width, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, directions, generator=generator) @ axes + 0.3 * torch.randn(
        count, width, generator=generator
    )


def test_the_distance_is_that_of_the_distribution_that_features_were_drawn_from() -> None:
    drawn = rows(20_000, 40, 4)
    mean, scale, basis = gaussian(drawn)
    assert basis.shape == (DIRECTIONS, 40)
    new = torch.cat([rows(200, 40, 4, seed=1), torch.randn(50, 40, generator=torch.Generator().manual_seed(2))])
    truth = multivariate_normal(drawn.mean(0).double(), torch.cov(drawn.T.double()))
    logs = torch.from_numpy(truth.logpdf(new.double().numpy()))
    # Up to a constant, the logarithm of the density is minus half the distance.
    distances = stranger_distance(new, mean, scale, basis).double()
    expected = -2 * (logs - truth.logpdf(drawn.mean(0).double().numpy()))
    torch.testing.assert_close(distances, expected, rtol=0.1, atol=2.0)


@pytest.mark.parametrize("count", [2, 3, 40])
def test_few_images_and_features_that_do_not_vary_are_no_trouble(count: int) -> None:
    features = rows(count, 24, 2)
    features[:, 5] = 1.0
    mean, scale, basis = gaussian(features)
    assert len(basis) == max(1, count // EACH)
    distances = stranger_distance(torch.cat([features, features + 9]), mean, scale, basis)
    assert distances.isfinite().all() and distances[:count].max() < distances[count:].min()


def test_training_publishes_what_tells_colours_from_strangers(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path, RECIPE), Silent(), World())
    unknown = AdapterStore(tmp_path).load("colours").adapter.unknown
    assert unknown is not None
    data = open_dataset(str(colours), 0)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, (3, 20, 24), generator=generator, dtype=torch.uint8) for _ in range(20)]
    with Engine(tiny, AdapterStore(tmp_path)) as engine:
        members, checked, strangers = (
            [answer for answer in engine.predict([("colours", image) for image in images])]
            for images in ([s.read() for s in data.test], [s.read() for s in data.val], noise)
        )
    shares = []
    for group in (members, checked, strangers):
        assert all(isinstance(answer, Prediction) for answer in group)
        shares.append([answer.known for answer in group if isinstance(answer, Prediction)])
    own, val, foreign = shares
    assert roc_auc_score([1] * len(own) + [0] * len(foreign), own + foreign) > 0.97
    assert sum(share >= LEAST_KNOWN for share in val) >= 0.9 * len(val)
    assert all(answer.unknown == (answer.known < LEAST_KNOWN) for answer in members)  # type: ignore[operator, union-attr]


def test_a_final_fit_has_no_images_to_measure_with(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    recipe = make_recipe("adamw", method="linear", epochs=1, warmup=0, final_fit=True)
    train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path, recipe), Silent(), World())
    assert AdapterStore(tmp_path).load("colours").adapter.unknown is None


@pytest.mark.parametrize("count", [1, 6, 20, 5000])
def test_at_least_95_percent_of_the_validation_images_are_known(count: int) -> None:
    distances = torch.rand(count, generator=torch.Generator().manual_seed(0))
    shares = known_share(knots_of(distances), distances)
    assert (shares >= LEAST_KNOWN).float().mean().item() >= 0.95
    assert shares[distances.argmin()] >= 0.99
    if count == 5000:
        assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
        assert (shares >= LEAST_KNOWN).float().mean().item() == pytest.approx(0.95, abs=0.011)


def test_images_that_are_all_alike_know_themselves() -> None:
    features = torch.ones(12, 24)
    mean, scale, basis = gaussian(features)
    distances = stranger_distance(torch.cat([features, features + 9]), mean, scale, basis)
    assert distances.isfinite().all() and distances[:12].max() < distances[12:].min()
