"""Frozen Vision Transformers: which ones, their fingerprints, sizes and preprocessing."""

import runpy
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from gpt_serve.errors import BackboneError, BackboneMismatch, UnsupportedBackbone
from gpt_serve.model import catalog
from gpt_serve.model.backbone import Backbone, fingerprint
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.catalog import BUNDLED, SMALL, TINY
from gpt_serve.model.prompted import embed, prompted_features
from gpt_serve.model.vit import check_supported
from gpt_serve.specs import Pool
from tests.factories import make_adapter
from tests.tiny_vit import PREPROCESS, tiny_backbone, tiny_vit

FINGERPRINTS = {
    TINY.name: "35d41c0de1083b33359b7b7935367fa778837facf94d1796a3f82d98edfa2954",
    SMALL.name: "1cb67d26e8baa2729a74193aac831dfc2a9fba3130afb0b21f6efcae10d47b51",
}


def refusal(name: str, error: type[BackboneError] = UnsupportedBackbone, **options: Any) -> str:
    with pytest.raises(BackboneError) as caught:
        Backbone.load(name, **options)
    assert type(caught.value) is error
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 400
    return message


# The bundled ones


def test_tiny_backbone(bundled: Backbone) -> None:
    spec = bundled.spec
    assert (bundled.name, spec.depth, spec.width, spec.pool) == (TINY.name, 12, 192, "mean")
    assert (spec.preprocess.input_size, bundled.family) == ((32, 32), "mae")
    assert bundled.model.num_prefix_tokens == 1
    assert bundled.fingerprint == spec.fingerprint


def test_small_backbone(small: Backbone) -> None:
    spec = small.spec
    assert (small.name, spec.depth, spec.width, spec.pool) == (SMALL.name, 12, 384, "cls")
    assert (spec.preprocess.input_size, small.family) == (SMALL.preprocess.input_size, None)
    assert small.model.num_prefix_tokens == 1 and small.model.blocks[0].attn.num_heads == 6


@torch.inference_mode()
def test_small_backbone_equals_timm_with_the_same_file(small: Backbone) -> None:
    side = SMALL.preprocess.input_size[0]
    plain = timm.create_model("vit_small_patch14_dinov2", img_size=side, num_classes=0)
    weights = load_file(SMALL.weights)
    table = resample_abs_pos_embed(weights.pop("pos_embed").float(), [side // 14] * 2, num_prefix_tokens=1)
    plain.load_state_dict({key: value.float() for key, value in weights.items()} | {"pos_embed": table})
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bare_features(small, images), plain.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BUNDLED)
def test_fingerprint_is_the_same_in_every_process_and_at_every_size(name: str) -> None:
    """Adapters carry it: what trained them and what serves them must agree on it."""
    patch = BUNDLED[name].patch
    assert [Backbone.load(name, input_size=size).fingerprint for size in (None, 4 * patch)] == 2 * [FINGERPRINTS[name]]


def test_bundled_backbone_at_another_size(bundled: Backbone) -> None:
    larger = Backbone.load(TINY.name, input_size=48)
    assert larger.spec.preprocess.input_size == (48, 48)
    expected = resample_abs_pos_embed(bundled.model.pos_embed, [12, 12], num_prefix_tokens=1)
    torch.testing.assert_close(larger.model.pos_embed, expected, rtol=0, atol=1e-6)
    assert torch.equal(larger.model.pos_embed[:, :1], bundled.model.pos_embed[:, :1])


def test_adapters_with_the_fingerprint_of_interpolated_weights_go_on_loading() -> None:
    """Until fingerprints were taken before the interpolation, this was the one in every adapter at another size."""
    backbone = Backbone.load(TINY.name, input_size=48)
    before = fingerprint(backbone.model)
    assert before != backbone.fingerprint
    make_adapter(backbone.spec, backbone_sha256=before).check_backbone(backbone.spec)
    make_adapter(backbone.spec).check_backbone(backbone.spec)
    with pytest.raises(BackboneMismatch):
        make_adapter(backbone.spec, backbone_sha256="ab" * 32).check_backbone(backbone.spec)


def test_pool_can_be_chosen() -> None:
    assert Backbone.load(TINY.name, pool="cls").spec.pool == "cls"


# Fingerprint


def test_fingerprint_changes_with_every_weight() -> None:
    model = tiny_vit(reg_tokens=2)
    original = fingerprint(model)
    for name, weight in model.named_parameters():
        flat = weight.data.view(-1)
        for index in (0, len(flat) - 1):
            kept = flat[index].clone()
            flat[index] += 1e-3
            assert fingerprint(model) != original, name
            flat[index] = kept
    assert fingerprint(model) == original


def test_fingerprint_tells_names_and_shapes_apart() -> None:
    state = {"a.weight": torch.zeros(2, 6), "b.weight": torch.zeros(3)}

    class Weights(torch.nn.Module):
        def __init__(self, tensors: dict[str, Tensor]) -> None:
            super().__init__()
            self.tensors = tensors

        def state_dict(self, *args: Any, **options: Any) -> dict[str, Tensor]:
            return self.tensors

    variants = [
        state,
        {"a.weight": torch.zeros(6, 2), "b.weight": torch.zeros(3)},
        {"a.weight": torch.zeros(2, 6), "c.weight": torch.zeros(3)},
        {"a.weight": torch.zeros(3), "b.weight": torch.zeros(2, 6)},
    ]
    assert len({fingerprint(Weights(variant)) for variant in variants}) == 4
    assert fingerprint(Weights(dict(reversed(state.items())))) == fingerprint(Weights(state))


def test_fingerprint_is_of_the_float32_values() -> None:
    model = tiny_vit().half().float()
    assert fingerprint(model) == fingerprint(model.half())


# Frozen


@pytest.mark.parametrize(("named", "expected"), [(None, SMALL.name), ("", SMALL.name), ("vit_x", "vit_x")])
def test_the_backbone_that_commands_take(monkeypatch: pytest.MonkeyPatch, named: str | None, expected: str) -> None:
    if named is None:
        monkeypatch.delenv("GPT_SERVE_BACKBONE", raising=False)
    else:
        monkeypatch.setenv("GPT_SERVE_BACKBONE", named)
    assert runpy.run_path(catalog.__file__)["DEFAULT_BACKBONE"] == expected


@pytest.mark.parametrize("name", [TINY.name, "vit_tiny_patch16_224"])
def test_everything_is_frozen(name: str) -> None:
    backbone = Backbone.load(name, pretrained=False, input_size=32)
    assert not any(weight.requires_grad for weight in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())
    assert backbone.device == torch.device("cpu")


def test_a_model_in_training_is_frozen() -> None:
    model = tiny_vit(drop_path_rate=0.5, proj_drop_rate=0.5).train()
    backbone = Backbone.from_model(model, "mine", PREPROCESS, "cls")
    assert not any(weight.requires_grad for weight in backbone.model.parameters())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(bare_features(backbone, images), bare_features(backbone, images))


# Which models

SUPPORTED = {
    "vit_small_patch14_dinov2.lvd142m": (56, "cls"),
    "vit_small_patch14_reg4_dinov2.lvd142m": (56, "cls"),
    "deit3_small_patch16_224.fb_in1k": (32, "cls"),
    "deit_tiny_patch16_224.fb_in1k": (32, "cls"),
    "vit_base_patch32_clip_224.openai": (64, "cls"),
    "vit_base_patch32_clip_quickgelu_224.openai": (64, "cls"),
    "vit_small_patch16_224.dino": (32, "cls"),
    "vit_tiny_patch16_224": (32, "cls"),
    "vit_wee_patch16_reg1_gap_256.sbb_in1k": (32, "mean"),
    "vit_base_patch16_siglip_224.v2_webli": (32, "attention"),
    "vit_base_patch16_siglip_gap_224.webli": (32, "mean"),
    "vit_small_patch16_dinov3.lvd1689m": (32, "mean"),
    "eva02_tiny_patch14_224.mim_in22k": (28, "mean"),
    "eva02_base_patch16_clip_224.merged2b": (32, "cls"),
}


def two_blocks(name: str, size: int, pool: Pool) -> Backbone:
    """The model of that name with random weights and only two blocks."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, img_size=size, depth=2, num_classes=0, dynamic_img_size=False)
    return Backbone.from_model(model, name, PREPROCESS, pool)


@torch.inference_mode()
def bare_features(backbone: Backbone, images: Tensor) -> Tensor:
    spec = backbone.spec
    bare = AdapterBatch.single(depth=spec.depth, width=spec.width, pool=spec.pool)
    return prompted_features(backbone.model, embed(backbone.model, images), bare)


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_model_equals_timm(name: str) -> None:
    size = SUPPORTED[name][0]
    backbone = two_blocks(name, size, SUPPORTED[name][1])
    assert backbone.spec.preprocess.input_size == (size, size)
    images = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(bare_features(backbone, images), backbone.timm_model(images), rtol=1e-5, atol=1e-5)


def test_parts_keep_the_names_that_timm_has_for_them(small: Backbone) -> None:
    """Weights that full fine-tuning stores, or a benchmark hands on, load as timm's."""
    own, timms = small.model.state_dict(), small.timm_model.state_dict()
    assert own.keys() == timms.keys()
    assert all(own[key].data_ptr() == timms[key].data_ptr() for key in own)


PICKED = {"vit_base_patch16_224.mae": (32, "mean")} | {
    name: SUPPORTED[name]
    for name in (
        "vit_small_patch14_reg4_dinov2.lvd142m",
        "vit_small_patch16_dinov3.lvd1689m",
        "vit_base_patch16_siglip_224.v2_webli",
    )
}


@pytest.mark.parametrize("name", PICKED)
def test_load_picks_size_and_pooling(name: str) -> None:
    size, pool = PICKED[name]
    backbone = Backbone.load(name, pretrained=False, input_size=size)
    assert backbone.name == name
    assert backbone.spec.pool == pool
    assert backbone.spec.preprocess.input_size == (size, size)
    assert backbone.spec.depth == len(backbone.model.blocks) == 12
    assert isinstance(backbone.timm_model.head, torch.nn.Identity)


REFUSED = {
    "swin_tiny_patch4_window7_224": "SwinTransformer is not a plain Vision Transformer",
    "convnext_tiny": "ConvNeXt is not a plain Vision Transformer",
    "resnet18": "ResNet is not a plain Vision Transformer",
    "eva02_enormous_patch14_clip_224": "its blocks are not standard pre-norm attention blocks",
    "deit_tiny_distilled_patch16_224": "VisionTransformerDistilled is not a plain Vision Transformer",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos is not a plain Vision Transformer",
    "samvit_base_patch16": "VisionTransformerSAM is not a plain Vision Transformer",
    "vit_small_patch16_18x2_224": "its blocks are not standard pre-norm attention blocks",
    "vit_base_patch16_xp_224": "its blocks are not standard pre-norm attention blocks",
    "vit_small_r26_s32_224": "it needs a fixed-size patch embedding of RGB images",
}


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where anything but shapes is made."""
    monkeypatch.setattr("gpt_serve.model.backbone._create", lambda *args, **options: pytest.fail("weights were made"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", REFUSED)
def test_model_that_is_no_plain_vit(name: str) -> None:
    message = refusal(name)
    assert message.startswith(f"backbone {name!r} is not supported: ") and REFUSED[name] in message


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    "name", ["vit_enormous", "", "mae-vit-tiny-33", "vit_tiny_patch16_224.nope", "hf-hub:a/b", "../vit", "a\nb"]
)
def test_unknown_name(name: str) -> None:
    message = refusal(name)
    assert message.startswith(f"unknown backbone {name!r}: use 'mae-vit-tiny-32', 'vit-small-14' or a timm model name")


@pytest.mark.parametrize(
    "options",
    [{"dynamic_img_size": True}, {"in_chans": 1}, {"global_pool": "max"}],
    ids=str,
)
def test_variant_that_the_forward_pass_does_not_compute(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedBackbone, match="backbone 'mine' is not supported: it"):
        check_supported(tiny_vit(**options), "mine")


def test_subclass_is_not_trusted() -> None:
    class Changed(VisionTransformer):
        pass

    with pytest.raises(UnsupportedBackbone, match="Changed is not a plain Vision Transformer"):
        check_supported(Changed(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1), "mine")


def test_cls_pooling_needs_a_cls_token() -> None:
    with pytest.raises(UnsupportedBackbone, match="has no CLS token: use --pool mean"):
        tiny_backbone("cls", class_token=False, global_pool="avg")


# Input size


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("name", "size", "advice"),
    [
        (TINY.name, 30, "4-pixel patches of backbone 'mae-vit-tiny-32': use 32"),
        (TINY.name, 1, "use 4"),
        (TINY.name, 0, "use 4"),
        (TINY.name, -8, "use 4"),
        ("vit_tiny_patch16_224", 100, "16-pixel patches of backbone 'vit_tiny_patch16_224': use 96"),
        ("vit_small_patch14_dinov2", 224 + 1, "use 224"),
    ],
)
def test_patches_must_tile_the_input(name: str, size: int, advice: str) -> None:
    message = refusal(name, BackboneError, input_size=size, pretrained=False)
    assert message.startswith(f"input size {size} is not a multiple of the ") and message.endswith(advice)


# Preprocessing


@pytest.mark.parametrize(
    "name", [*SUPPORTED, "vit_base_patch16_siglip_gap_224.webli", "vit_base_patch16_clip_384.laion2b_ft_in1k"]
)
def test_preprocessing_is_timms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(model_name: str, **options: Any) -> Any:
        return create(model_name, **options, depth=1, embed_dim=24, num_heads=3)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", small)
    preprocess = Backbone.load(name, pretrained=False).spec.preprocess
    expected = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert preprocess.input_size == expected["input_size"][1:]
    assert preprocess.crop_pct == expected["crop_pct"]
    assert preprocess.interpolation == expected["interpolation"]
    assert preprocess.mean == expected["mean"]
    assert preprocess.std == expected["std"]
    assert preprocess.crop_mode == expected["crop_mode"]


# Where weights cannot be had


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> None:
        raise OSError("We couldn't connect to the hub to load the files.\nCheck your connection.\n" + 300 * "x ")

    monkeypatch.setattr("timm.models._builder.load_pretrained", unreachable)
    message = refusal("vit_tiny_patch16_224", BackboneError)
    assert message == (
        "weights of 'vit_tiny_patch16_224' cannot be had from the hub; pass --checkpoint FILE or use --backbone "
        "mae-vit-tiny-32 (OSError: We couldn't connect to the hub to load the files.)"
    )


def test_model_without_published_weights() -> None:
    message = refusal("vit_small_patch16_36x1_224", BackboneError)
    assert "No pretrained weights exist" in message and "pass --checkpoint FILE" in message


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_device_that_is_not_there(device: str) -> None:
    message = refusal(TINY.name, BackboneError, device=device)
    assert message.startswith(f"device {device!r} cannot be used here: use cpu or auto (")
