"""NMI against scikit-learn, and what training records of it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import UsageError
from gpt_serve.insight.attention import adapter_rows, by_block
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.prompted import embed
from gpt_serve.train import fit as fitting
from gpt_serve.train.data.views import View
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.nmi import normalized_mutual_information, plot_nmi, prompt_nmi, recorded_nmi
from gpt_serve.train.recipes.recipe import make_recipe
from tests.factories import make_adapter
from tests.tiny_vit import METHODS, random_images
from tests.train.conftest import Recorder

RECIPE = make_recipe("paper", prompts=4, gate_init=1.0, epochs=3, warmup=1, lr=0.02, batch_size=8)


def conditional(queries: int, keys: int, seed: int, sharpness: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(queries, keys, generator=generator, dtype=torch.float64)).softmax(dim=-1)


@pytest.mark.parametrize("seed", range(5))
def test_deterministic_attention_is_a_clustering(seed: int) -> None:
    """Every query looks at one key: the keys are labels, and scikit-learn can say what they share with the queries."""
    labels = torch.randint(0, 5, (12,), generator=torch.Generator().manual_seed(seed))
    ours = normalized_mutual_information(torch.eye(7, dtype=torch.float64)[labels])
    theirs = normalized_mutual_info_score(range(12), labels.tolist(), average_method="geometric")
    assert ours.item() == pytest.approx(theirs)


@pytest.mark.parametrize("seed", range(3))
def test_soft_attention_against_counts(seed: int) -> None:
    """A joint distribution in 1,000ths is a list of that many pairs for scikit-learn."""
    counts = torch.multinomial(conditional(6, 9, seed), 1000, replacement=True)  # (6, 1000) keys
    queries = [query for query in range(6) for _ in range(1000)]
    theirs = normalized_mutual_info_score(queries, counts.flatten().tolist(), average_method="geometric")
    shares = torch.stack([row.bincount(minlength=9) for row in counts]).double() / 1000
    assert normalized_mutual_information(shares).item() == pytest.approx(theirs)


def test_uniform_attention_shares_nothing() -> None:
    assert normalized_mutual_information(torch.full((6, 9), 1 / 9).double()).item() == pytest.approx(0, abs=1e-7)


def test_a_key_of_its_own_for_each_query_is_all() -> None:
    assert normalized_mutual_information(torch.eye(6).double()[torch.randperm(6)]).item() == pytest.approx(1)


@pytest.mark.parametrize("rows", [torch.eye(4)[:1], torch.eye(4)[[2, 2, 2]]])
def test_nothing_is_shared_where_an_entropy_is_zero(rows: Tensor) -> None:
    assert normalized_mutual_information(rows.double()).item() == 0


def test_batches_are_independent() -> None:
    rows = torch.stack([conditional(6, 9, seed) for seed in range(4)])
    alone = torch.stack([normalized_mutual_information(row) for row in rows])
    torch.testing.assert_close(normalized_mutual_information(rows), alone)


@pytest.mark.parametrize("method", METHODS)
def test_prompts_are_queries_and_patches_are_keys(tiny: Backbone, method: str) -> None:
    adapter = adapter_rows(tiny, make_adapter(tiny.spec, method=method))
    tokens = embed(tiny.model, random_images(2))  # CLS and 16 patches
    expected = []
    for weights in by_block(tiny.model, tokens, adapter, lambda found: found.double()):
        values = [0.0]
        if adapter.prompts:
            pairs = [weights[image, head, 17:, 1:17] for image in range(2) for head in range(3)]
            values = [normalized_mutual_information(pair / pair.sum(1, keepdim=True)).item() for pair in pairs]
        expected.append(sum(values) / len(values))
    assert prompt_nmi(tiny.model, tokens, adapter) == pytest.approx(expected)
    assert (max(expected) > 0) == (method != "linear")


def test_prompts_that_only_see_prompts_share_nothing(tiny: Backbone) -> None:
    prompt = 1e3 * torch.eye(24)[None, :5]
    adapter = make_adapter(tiny.spec, method="gated", prompt=prompt, tau=torch.full((3,), 0.01))
    values = prompt_nmi(tiny.model, embed(tiny.model, random_images(2)), adapter_rows(tiny, adapter))
    assert all(0 <= value <= 1 for value in values)


def fit(tiny: Backbone, colours: Path, root: Path, *, nmi: bool, resume: bool = False, **options: Any) -> Any:

    job = TrainingJob("colours", str(colours), root, RECIPE, nmi=nmi, resume=resume, workers=0)
    train_adapter(tiny, job, Recorder(**options), World())
    return AdapterStore(root).load("colours").adapter


@pytest.fixture(scope="module")
def measured(tiny: Backbone, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fit(tiny, colours, tmp_path_factory.mktemp("measured"), nmi=True)


def test_training_records_a_row_per_epoch(measured: Any) -> None:
    nmi = recorded_nmi(measured)
    assert nmi.shape == (3, 3)
    assert ((nmi > 0) & (nmi <= 1)).all()
    assert not torch.equal(nmi[0], nmi[2])


def test_without_validation_images_the_training_images_are_measured_as_they_are(
    tiny: Backbone, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[View] = []
    monkeypatch.setattr(fitting, "nmi_probe", lambda backbone, module, view: probed.append(view))
    recipe = dataclasses.replace(RECIPE, final_fit=True)
    train_adapter(
        tiny, TrainingJob("colours", str(colours), tmp_path, recipe, nmi=True, workers=0), Recorder(), World()
    )
    assert [view.augment for view in probed] == ["none"]


def test_measuring_changes_nothing(tiny: Backbone, colours: Path, tmp_path: Path, measured: Any) -> None:
    plain = fit(tiny, colours, tmp_path, nmi=False)
    assert "nmi" not in plain.training
    for name in ("prompt", "gamma", "tau", "head_weight"):
        assert torch.equal(getattr(plain, name), getattr(measured, name))


def test_a_resumed_run_has_the_whole_curve(tiny: Backbone, colours: Path, tmp_path: Path, measured: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(tiny, colours, tmp_path, nmi=True, interrupt_at=2)
    with pytest.raises(UsageError, match="nmi was True and is False"):
        fit(tiny, colours, tmp_path, nmi=False, resume=True)
    assert fit(tiny, colours, tmp_path, nmi=True, resume=True).training["nmi"] == measured.training["nmi"]


@pytest.mark.parametrize("nmi", [None, [], [[]], "text", [[1, 2], [3]], {"a": 1}, [0.5], [[10**400]]])
def test_other_adapters_have_none(nmi: Any) -> None:
    training = {} if nmi is None else {"nmi": nmi}
    with pytest.raises(UsageError, match="--nmi: alpha was trained without: train with --nmi$"):
        recorded_nmi(make_adapter(training=training))


def test_an_adapter_without_prompts_is_told_so() -> None:
    with pytest.raises(UsageError, match="it has no prompts"):
        recorded_nmi(make_adapter(method="linear"))


def test_plot(tmp_path: Path) -> None:
    plot_nmi(torch.rand(5, 12), "title", tmp_path / "nmi.png")
    assert (tmp_path / "nmi.png").read_bytes().startswith(b"\x89PNG")
