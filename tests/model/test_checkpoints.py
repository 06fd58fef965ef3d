"""Weights from files: published layouts, and what is refused."""

import io
import math
import os
import pickle
import tarfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from gpt_serve.errors import CheckpointError
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.checkpoints import load_checkpoint, read_checkpoint
from tests.tiny_vit import tiny_kind, tiny_vit

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """The frozen encoder's state dict, by timm's names."""
    return tiny_vit().state_dict()


def blank(**options: Any) -> nn.Module:
    """The same architecture with other weights."""
    model = tiny_vit(**options)
    for weight in model.parameters():
        nn.init.constant_(weight, 9.0)
    return model


def load(model: nn.Module, path: Path) -> str | None:
    """Load the file into ``model``; its family."""
    checkpoint = read_checkpoint(path)
    load_checkpoint(model, checkpoint)
    return checkpoint.family


def saved(tmp_path: Path, content: Any, name: str = "weights.pth", **options: Any) -> Path:
    torch.save(content, tmp_path / name, **options)
    return tmp_path / name


def check_loads(path: Path, expected: Weights, family: str | None) -> None:
    """Exactly the encoder's keys are read, and the model ends up with exactly these values."""
    assert set(read_checkpoint(path).weights) - {"mask_token"} == set(expected)
    model = blank()
    assert load(model, path) == family
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def mae(encoder: Weights) -> Weights:
    """The keys of a full MAE model: the encoder and a decoder of width 8 with one block."""
    decoder: Weights = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 17, 8),
        "decoder_embed.weight": torch.zeros(8, 24),
        "decoder_embed.bias": torch.zeros(8),
        "decoder_norm.weight": torch.zeros(8),
        "decoder_norm.bias": torch.zeros(8),
        "decoder_pred.weight": torch.zeros(48, 8),
        "decoder_pred.bias": torch.zeros(48),
    }
    block = tiny_vit(embed_dim=8, num_heads=1, depth=1).blocks[0].state_dict()
    return encoder | decoder | {f"decoder_blocks.0.{key}": value for key, value in block.items()}


def computed_positions(family: str, side: int, width: int) -> Tensor:
    """Position embeddings (1, 1 + side * side, width) as the two published codes compute them, number by number.

    Both keep half of the width for an axis: sines, then cosines, of the position at rising wavelengths. MAE's first
    half is the column (``np.meshgrid`` with the columns first), MoCo v3's the row (``torch.meshgrid``, ``ij``).
    """
    table = torch.zeros(1, 1 + side * side, width)
    for row in range(side):
        for column in range(side):
            axes = (column, row) if family == "mae" else (row, column)
            for half, position in enumerate(axes):
                for index in range(width // 4):
                    angle = position / 10000 ** (index / (width // 4))
                    place = half * width // 2 + index
                    table[0, 1 + row * side + column, place] = math.sin(angle)
                    table[0, 1 + row * side + column, place + width // 4] = math.cos(angle)
    return table


def moco(base: Weights, momentum: Weights) -> Weights:
    """The keys of MoCo v3: two encoders, each with a projector as head, and a predictor, below ``module.``."""
    mlp = {"0.weight": torch.zeros(32, 24), "1.running_mean": torch.zeros(32), "1.num_batches_tracked": torch.tensor(7)}
    encoders = {"base_encoder": base, "momentum_encoder": momentum}
    state = {f"module.{name}.{key}": value for name, part in encoders.items() for key, value in part.items()}
    state |= {f"module.{name}.head.{key}": value for name in encoders for key, value in mlp.items()}
    return state | {f"module.predictor.{key}": value for key, value in mlp.items()}


# What loads


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("family", ["mae", "mocov3", None])
def test_the_family_is_seen_in_the_weights(
    tmp_path: Path, weights: Weights, family: str | None, wrapped: bool, half: bool
) -> None:
    """Not in what lies around them: DeiT's and many others' weights are under ``model``, too."""
    stored = dict(weights) if family is None else weights | {"pos_embed": computed_positions(family, 4, 24)}
    if half:
        stored = {key: value.half() for key, value in stored.items()}
    expected = {key: value.float() for key, value in stored.items()}
    check_loads(saved(tmp_path, {"model": stored} if wrapped else stored), expected, family)


def test_mae_training_run_with_decoder_and_arguments(tmp_path: Path, weights: Weights) -> None:
    run = {"model": mae(weights), "optimizer": {"state": {}}, "epoch": 3, "args": Namespace(mask_ratio=0.75)}
    check_loads(saved(tmp_path, run), weights, "mae")


def test_finetuned_model_is_not_taken_for_mae(tmp_path: Path, weights: Weights) -> None:
    tuned = weights | {"pos_embed": computed_positions("mae", 4, 24)}
    tuned |= {"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}
    assert read_checkpoint(saved(tmp_path, {"model": tuned})).family is None


def test_moco_v3_takes_the_base_encoder(tmp_path: Path, weights: Weights) -> None:
    other = {key: value + 1 for key, value in weights.items()}
    run = {"epoch": 300, "arch": "vit_base", "state_dict": moco(weights, other), "optimizer": {}, "scaler": {}}
    check_loads(saved(tmp_path, run, "vit-b-300ep.pth.tar"), weights, "mocov3")


def test_moco_v3_with_the_momentum_encoder_alone(tmp_path: Path, weights: Weights) -> None:
    alone = {f"module.momentum_encoder.{key}": value for key, value in weights.items()}
    check_loads(saved(tmp_path, {"state_dict": alone}), weights, "mocov3")


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_timm_state_dict(tmp_path: Path, weights: Weights, suffix: str, head: bool) -> None:
    stored = tiny_vit(num_classes=7).state_dict() | weights if head else weights
    assert len(stored) == len(weights) + (2 if head else 0)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(stored, path)
    else:
        torch.save(stored, path)
    check_loads(path, weights, None)


@pytest.mark.parametrize(("stated", "family"), [("mae", "mae"), ("mocov3", "mocov3"), ("dino", None)])
def test_metadata_may_name_the_family(tmp_path: Path, weights: Weights, stated: str, family: str | None) -> None:
    save_file(weights, tmp_path / "weights.safetensors", metadata={"family": stated})
    check_loads(tmp_path / "weights.safetensors", weights, family)


def test_timm_training_run(tmp_path: Path, weights: Weights) -> None:
    run = {"epoch": 1, "arch": "vit", "state_dict": weights, "args": Namespace(lr=0.1), "version": 2, 3: "not a name"}
    check_loads(saved(tmp_path, run), weights, None)


def test_legacy_format(tmp_path: Path, weights: Weights) -> None:
    check_loads(saved(tmp_path, weights, _use_new_zipfile_serialization=False), weights, None)


def test_half_precision_is_widened(tmp_path: Path, weights: Weights) -> None:
    halves = {key: value.half() for key, value in weights.items()}
    path = saved(tmp_path, halves)
    model = blank()
    load(model, path)
    assert all(torch.equal(value, halves[key].float()) for key, value in model.state_dict().items())
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


def test_model_that_pools_before_its_norm(tmp_path: Path, weights: Weights) -> None:
    path = saved(tmp_path, weights)
    model = blank(global_pool="avg")
    assert isinstance(model.norm, nn.Identity)
    load(model, path)
    assert torch.equal(model.fc_norm.weight, weights["norm.weight"])
    assert torch.equal(model.fc_norm.bias, weights["norm.bias"])
    own = tiny_vit(global_pool="avg").state_dict()
    load(model, saved(tmp_path, own))
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


def test_model_takes_on_the_size_of_the_file(tmp_path: Path, weights: Weights) -> None:
    """So that the fingerprint is that of the file's own tensors; `Backbone` interpolates them afterwards."""
    model = blank(img_size=24)
    load(model, saved(tmp_path, weights))
    assert tuple(model.patch_embed.img_size) == (16, 16)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}], ids=str)
def test_size_of_the_file_with_any_prefix(tmp_path: Path, options: dict[str, Any]) -> None:
    own = tiny_vit(img_size=40, **options).state_dict()
    model = blank(img_size=24, **options)
    load(model, saved(tmp_path, own))
    assert tuple(model.patch_embed.img_size) == (40, 40)
    assert torch.equal(model.pos_embed, own["pos_embed"])


def test_position_embeddings_are_interpolated_in_float32(tmp_path: Path, bundled: Backbone) -> None:
    halves = {key: value.half() for key, value in bundled.model.state_dict().items()}
    loaded = Backbone.load(bundled.name, checkpoint=saved(tmp_path, halves), input_size=24)
    expected = resample_abs_pos_embed(halves["pos_embed"].float(), [6, 6], num_prefix_tokens=1)
    assert torch.equal(loaded.model.pos_embed, expected)
    assert torch.equal(loaded.model.norm.weight, halves["norm.weight"].float())


@pytest.mark.parametrize(("family", "pool"), [("mae", "mean"), ("moco", "cls"), ("timm", "cls")])
def test_the_checkpoint_decides_family_and_pooling_of_a_timm_backbone(tmp_path: Path, family: str, pool: str) -> None:
    donor = Backbone.load("vit_tiny_patch16_224", pretrained=False).model.state_dict()
    released = donor | {"pos_embed": computed_positions("mae", 14, 192)}
    content = {"mae": {"model": released}, "moco": {"state_dict": moco(donor, donor)}, "timm": donor}[family]
    path = saved(tmp_path, content)
    loaded = Backbone.load("vit_tiny_patch16_224", input_size=32, checkpoint=path)
    scale = [(0.5, 0.5, 0.5)] * 2 if family == "timm" else [(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]
    assert [loaded.spec.preprocess.mean, loaded.spec.preprocess.std] == scale
    assert (loaded.spec.pool, loaded.family) == (pool, {"mae": "mae", "moco": "mocov3", "timm": None}[family])
    assert Backbone.load("vit_tiny_patch16_224", input_size=32, checkpoint=path, pool="mean").spec.pool == "mean"


WRAPPED: dict[str, Callable[[Weights], Any]] = {
    "torch's data parallel": lambda w: {f"module.{key}": value for key, value in w.items()},
    "torch.compile": lambda w: {f"_orig_mod.{key}": value for key, value in w.items()},
    "both": lambda w: {"model": {f"_orig_mod.module.{key}": value for key, value in w.items()}},
    "Lightning": lambda w: {"state_dict": {f"model.{key}": value for key, value in w.items()}, "epoch": 3},
    "a backbone": lambda w: {f"backbone.{key}": value for key, value in w.items()},
    "DINOv2": lambda w: {"model": {f"teacher.backbone.{key}": value for key, value in w.items()}},
    "DINO": lambda w: {
        "student": {f"module.backbone.{key}": value + 1 for key, value in w.items()},
        "teacher": {f"backbone.{key}": value for key, value in w.items()} | {"head.mlp.0.weight": torch.ones(2, 24)},
    },
    "timm, averaged": lambda w: {"state_dict": {k: v + 1 for k, v in w.items()}, "state_dict_ema": w, "arch": "vit"},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_lies_around_an_encoder(tmp_path: Path, weights: Weights, name: str) -> None:
    check_loads(saved(tmp_path, WRAPPED[name](weights)), weights, None)


@pytest.mark.parametrize("name", ["dinov3", "eva02", "eva02, larger"])
def test_eva_family(tmp_path: Path, name: str) -> None:
    own = tiny_kind(name).timm_model.state_dict()
    model = tiny_kind(name).timm_model
    for weight in model.parameters():
        nn.init.constant_(weight, 9.0)
    load(model, saved(tmp_path, {"teacher": {f"backbone.{key}": value for key, value in own.items()}}))
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


def test_dinov2_with_registers(tmp_path: Path) -> None:
    """Meta's layout: register tokens under another name, a position for CLS, a mask token. timm's model has neither."""
    model = blank(reg_tokens=4, no_embed_class=True)
    own = tiny_vit(reg_tokens=4, no_embed_class=True).state_dict()
    stored = {key: value for key, value in own.items() if key != "reg_token"}
    stored |= {"register_tokens": own["reg_token"], "mask_token": torch.ones(1, 24)}
    stored["pos_embed"] = torch.cat([torch.full((1, 1, 24), 0.5), own["pos_embed"]], dim=1)
    load(model, saved(tmp_path, stored))
    expected = own | {"cls_token": own["cls_token"] + 0.5}
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("arch", ["vit_small", None], ids=["named", "told by its width"])
def test_moco_v3_small_has_twelve_heads(tmp_path: Path, arch: str | None) -> None:
    """timm's ViT-S has six, with the same shapes: its features would be others without a word."""
    published = timm.create_model("vit_small_patch16_224", num_heads=12, depth=2, num_classes=0)
    run = {"arch": arch, "state_dict": moco(published.state_dict(), published.state_dict())}
    path = saved(tmp_path, run)
    checkpoint = read_checkpoint(path)
    assert checkpoint.arguments == {"num_heads": 12}
    with pytest.raises(CheckpointError, match="it has 12 attention heads, not 6"):
        load_checkpoint(timm.create_model("vit_small_patch16_224", depth=2, num_classes=0), checkpoint)


def test_backbone_is_built_with_the_heads_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **options, depth=2))
    published = create("vit_small_patch16_224", num_heads=12, depth=2, num_classes=0).eval()
    path = saved(tmp_path, {"arch": "vit_small", "state_dict": moco(published.state_dict(), published.state_dict())})
    backbone = Backbone.load("vit_small_patch16_224", checkpoint=path)
    images = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(backbone.timm_model(images), published(images))


def test_openai_clip_has_quick_gelu(tmp_path: Path) -> None:
    stored = {"visual.class_embedding": torch.zeros(24), "input_resolution": torch.tensor(224)}
    assert read_checkpoint(saved(tmp_path, stored)).arguments == {"act_layer": "quick_gelu"}


# What is refused


def test_patches_of_another_size_are_not_resampled(tmp_path: Path) -> None:
    stored = tiny_vit(img_size=32, patch_size=8).state_dict()
    assert refusal(saved(tmp_path, stored)) == (
        "does not fit the backbone: its patches are 8 x 8 pixels, the backbone's 4 x 4: choose a backbone with a patch "
        "size of 8"
    )


def test_unknown_prefix_is_named(tmp_path: Path, weights: Weights) -> None:
    message = refusal(saved(tmp_path, {f"vision_tower.{key}": value for key, value in weights.items()}))
    assert "begin with 'vision_tower.', which is not known here" in message


class Exploit:
    """A pickle that makes a folder when it is loaded by an unguarded reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def npz(weights: Weights) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{key: value.numpy() for key, value in weights.items()})
    return buffer.getvalue()


def tar(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("weights.pth")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def as_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


UNREADABLE: dict[str, Callable[[Weights], bytes]] = {
    "empty.pth": lambda weights: b"",
    "empty.safetensors": lambda weights: b"",
    "text.pth": lambda weights: b"version https://git-lfs.github.com/spec/v1\n",
    "text.safetensors": lambda weights: b"version https://git-lfs.github.com/spec/v1\n",
    "pickle-in.safetensors": lambda weights: as_bytes(weights),
    "cut-early.pth": lambda weights: as_bytes(weights)[:100],
    "cut-half.pth": lambda weights: as_bytes(weights)[: len(as_bytes(weights)) // 2],
    "cut-late.pth": lambda weights: as_bytes(weights)[:-10],
    "cut-legacy.pth": lambda weights: as_bytes(weights, _use_new_zipfile_serialization=False)[:-10],
    "numpy.npz": npz,
    "archive.tar": lambda weights: tar(as_bytes(weights)),
    "protocol-4.pkl": lambda weights: pickle.dumps({"lr": 1}, protocol=4),
}


def refusal(path: Path) -> str:
    model = blank()
    with pytest.raises(CheckpointError) as caught:
        load(model, path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 500
    assert message.startswith(f"checkpoint {path} ")
    return message.removeprefix(f"checkpoint {path} ")


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file(tmp_path: Path, weights: Weights, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(UNREADABLE[name](weights))
    assert refusal(path).startswith("cannot be read as .safetensors or as a weights-only .pth: ")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_safetensors(tmp_path: Path, weights: Weights, share: float) -> None:
    save_file(weights, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[: 10 + int(share * (len(data) - 20))])
    assert refusal(path).startswith("cannot be read")


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, weights: Weights, new: bool) -> None:
    trap = tmp_path / "executed"
    content = {"model": weights, "hook": Exploit(trap)}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=new)
    assert "Python object (posix.mkdir)" in refusal(path) or os.name != "posix"
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the exploit works where it is let in


def test_a_pickled_model_is_refused_with_advice(tmp_path: Path) -> None:
    assert refusal(saved(tmp_path, tiny_vit())).endswith("which could run code; save the state dict alone")


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.ones(3),
        {},
        {"epoch": 3},
        {1: torch.ones(2)},
        {"model": {}},
        {"state_dict": {"step": torch.tensor(3)}},
        {"head.weight": torch.ones(2, 2)},
    ],
    ids=repr,
)
def test_file_without_weights(tmp_path: Path, content: Any) -> None:
    assert refusal(saved(tmp_path, content)) == "holds no weights: expected a timm, MAE or MoCo v3 state dict"


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.pth") == "does not exist"
    assert refusal(tmp_path) == "is not a file"


WRONG: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "deeper": (lambda weights: tiny_vit(depth=4).state_dict(), "unexpected blocks.3.norm1.weight"),
    "shallower": (lambda weights: tiny_vit(depth=2).state_dict(), "missing blocks.2.norm1.weight"),
    "narrower": (lambda weights: tiny_vit(embed_dim=12).state_dict(), "size mismatch"),
    "registers": (lambda weights: weights | {"reg_token": torch.zeros(1, 4, 24)}, "unexpected reg_token"),
    "one key less": (lambda weights: {k: v for k, v in weights.items() if k != "cls_token"}, "missing cls_token"),
    "another model": (lambda weights: {"conv1.weight": torch.zeros(8, 3, 3, 3)}, "missing cls_token"),
    "flat positions": (lambda weights: weights | {"pos_embed": torch.zeros(3)}, "index out of range"),
    "odd grid": (lambda weights: weights | {"pos_embed": torch.zeros(1, 19, 24)}, "size mismatch for pos_embed"),
    "complex": (lambda weights: weights | {"norm.weight": torch.zeros(24, dtype=torch.complex64)}, "missing norm"),
    "nested": (lambda weights: {"encoder": torch.zeros(2)}, "has no attribute"),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_of_another_architecture(tmp_path: Path, weights: Weights, name: str) -> None:
    change, reason = WRONG[name]
    message = refusal(saved(tmp_path, change(weights)))
    assert message.startswith("does not fit the backbone: ") and reason in message
