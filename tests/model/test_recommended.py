"""What is said of recommended backbones, against timm and the files that ship."""

import pytest
import timm
import torch

from gpt_serve.model.backbone import default_pool
from gpt_serve.model.catalog import BUNDLED
from gpt_serve.model.recommended import RECOMMENDED, Recommended
from gpt_serve.model.vit import check_supported

HUB = [entry for entry in RECOMMENDED if not entry.bundled]


def test_all_that_ship_are_listed_first() -> None:
    assert {entry.name for entry in RECOMMENDED[: len(BUNDLED)]} == set(BUNDLED)


@pytest.mark.parametrize("entry", RECOMMENDED[: len(BUNDLED)], ids=lambda entry: entry.name)
def test_bundled_backbone_is_as_listed(entry: Recommended) -> None:
    bundled = BUNDLED[entry.name]
    assert entry.megabytes == round(bundled.weights.stat().st_size / 1e6)
    assert (entry.input_size, entry.pool) == (bundled.preprocess.input_size[0], bundled.pool)
    assert set(entry.measured) == {"flowers12", "caltech101"}


@pytest.mark.parametrize("entry", HUB, ids=lambda entry: entry.name)
def test_backbone_of_the_hub_is_as_timm_has_it(entry: Recommended) -> None:
    with torch.device("meta"):
        model = timm.create_model(entry.name, num_classes=0)
    config = timm.get_pretrained_cfg(entry.name)
    check_supported(model, entry.name, fixed_size=False)
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1) == entry.parameters
    assert config.license.replace("-", " ").lower() == entry.licence.replace("-", " ").lower()
    assert config.input_size[1] == entry.input_size
    assert entry.pool == ("mean" if entry.name.endswith(".mae") else default_pool(model))
    assert config.hf_hub_id and not entry.measured
