"""The yardsticks compute what they say, and answer as the engine does."""

import dataclasses
from pathlib import Path

import pytest
import torch

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.authors import AuthorsModel
from gpt_serve.bench.lora import LoraModel, lora_bytes
from gpt_serve.bench.peers import check_answers
from gpt_serve.bench.setting import pixels, ready, untrained_adapter, write_adapters
from gpt_serve.bench.swapped import TaskModel, grouped, in_arrival_order
from gpt_serve.engine.engine import Engine
from gpt_serve.model.backbone import Backbone
from tests import reference
from tests.factories import make_adapter
from tests.tiny_vit import random_images, tiny_backbone


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_authors_loop_equals_the_reference(pool: str) -> None:
    backbone = tiny_backbone(pool)  # type: ignore[arg-type]
    adapter = dataclasses.replace(make_adapter(backbone.spec), tau=torch.tensor([0.5, 1.5, 12.0]))
    images = random_images(2)
    actual = AuthorsModel(backbone, adapter)(images)
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


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_all_ways_to_serve_answer_alike(pool: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(pool)  # type: ignore[arg-type]
    store = AdapterStore(tmp_path, backbone.spec)
    adapters = write_adapters(store, backbone, "task", 2, [("gated", 3)])
    chosen, raw = [adapters[index] for index in (0, 1, 1, 0, 1)], pixels(backbone, 5)
    images, engine = ready(backbone, raw), Engine(backbone, store)
    check_answers(engine, chosen, raw, images)
    models = [TaskModel(backbone, adapter) for adapter in adapters]
    with torch.inference_mode():
        expected = grouped(models[:1], chosen, images)
        torch.testing.assert_close(in_arrival_order(models[0], chosen, images), expected)
        models[0].load(adapters[0])
        torch.testing.assert_close(grouped(models, chosen, images), expected)
    with pytest.raises(AssertionError, match="differ from the engine's"):
        check_answers(engine, chosen, raw, images.flip(0))


@pytest.mark.slow
def test_peft_computes_each_image_with_its_own_adapter(tiny: Backbone) -> None:
    pytest.importorskip("peft")
    adapters = [untrained_adapter(tiny, f"task-{index}", prompts=2) for index in range(3)]
    model, images = LoraModel(tiny, adapters), random_images(4)
    names = ["task-2", "task-0", "task-2", "task-1"]
    with torch.inference_mode():
        mixed = model(images, names)
        for row, name in enumerate(names):
            alone = model(images[row : row + 1], [name])[0]
            torch.testing.assert_close(mixed[row], alone)
        assert not torch.allclose(model(images[:1], ["task-0"]), model(images[:1], ["task-1"]))
    weights = [value for name, value in model.peft.named_parameters() if ".task-0." in name]
    assert sum(4 * weight.numel() for weight in weights) == lora_bytes(tiny)
