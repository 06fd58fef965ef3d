"""The comparison of exported graphs measures what it says."""

from pathlib import Path

import pytest
import torch

from gpt_serve.bench.timing import Plan
from tests import reference
from tests.factories import make_adapter
from tests.tiny_vit import random_images, tiny_backbone


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "export")


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_yardstick_equals_the_reference(pool: str) -> None:
    from plain import PlainGated

    backbone = tiny_backbone(pool)  # type: ignore[arg-type]
    adapter = make_adapter(backbone.spec)
    images = random_images(2)
    actual = PlainGated(backbone, adapter)(images)
    for row, image in enumerate(images):
        expected = reference.forward(
            backbone.model,
            image,
            pool=pool,
            head_weight=adapter.head_weight,
            head_bias=adapter.head_bias,
            prompt=adapter.prompt,
            gamma=adapter.gamma,
            tau=adapter.tau,
        )
        torch.testing.assert_close(actual[row], expected.logits.softmax(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_all_variants_answer_alike_and_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import compare

    answers = {}

    def interleave(variants: dict[str, object], plan: Plan) -> dict[str, list[float]]:
        for name, call in variants.items():
            result = call()  # type: ignore[operator]
            answers[name] = torch.as_tensor(result[0] if isinstance(result, list) else result)
        return {name: [1.0, 2.0] for name in variants}

    monkeypatch.setattr(compare, "interleave", interleave)
    rows = compare.bench_export(tiny_backbone(depth=2), Plan(repeats=1), batches=(2,), prompts=3)
    assert [row.variant for row in rows] == [
        "naive export",
        "torch eager",
        "folded",
        "folded, gates closed",
        "folded, int8",
    ]
    for name in ("torch eager", "folded"):
        torch.testing.assert_close(answers[name], answers["naive export"], rtol=1e-5, atol=1e-5)
    assert not torch.equal(answers["folded, gates closed"], answers["folded"])
    nodes = {row.variant: row.extra.get("nodes", 0) for row in rows}
    assert nodes["folded, gates closed"] < nodes["folded"] < nodes["naive export"]
    assert rows[2].extra["speed by torch"] == rows[2].extra["speed by naive"] == 1.0
