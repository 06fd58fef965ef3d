"""``benchmarks/pretrain_backbone.py``: the losses, the images, resuming, and the weights it leaves."""

import importlib
import io
import math
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as vision

from gpt_serve.errors import DataError, UsageError
from gpt_serve.images.preprocess import normalize
from gpt_serve.model.backbone import BUNDLED, Backbone, bundled_model
from gpt_serve.train.checkpoint import RunCheckpoint
from tests.tiny_vit import PREPROCESS, SIDE, random_images, tiny_vit

pytest.importorskip("lightly")
PATCH = 4


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def script(importable: None) -> ModuleType:
    return importlib.import_module("pretrain_backbone")


def random_pixels(count: int, side: int = SIDE) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def jpeg(seed: int, size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def archive(folder: Path, count: int = 6) -> Path:
    files = {f"train/n0/images/{index}.JPEG": jpeg(index) for index in range(count - 1)}
    files |= {"train/n0/boxes.txt": b"text", "val/images/v.JPEG": jpeg(50), "test/images/t.JPEG": jpeg(60, (48, 40))}
    return pack(folder / "images.tar.xz", files)


# --- the masked autoencoder -------------------------------------------------------------------------------------------


def reference_loss(predicted: Tensor, images: Tensor, masked: Tensor) -> float:
    """He et al., section 3, one patch at a time: raster order, variance as their code takes it (n - 1)."""
    across, errors = images.shape[-1] // PATCH, []
    for image, rows, answers in zip(images, masked, predicted, strict=True):
        for row, answer in zip(rows.tolist(), answers, strict=True):
            down, right = divmod(row - 1, across)  # row 0 is CLS
            patch = image[:, down * PATCH : (down + 1) * PATCH, right * PATCH : (right + 1) * PATCH]
            target = (patch - patch.mean()) / (patch.var() + 1e-6) ** 0.5
            errors += [
                (answer[(y * PATCH + x) * 3 + channel] - target[channel, y, x]) ** 2
                for y in range(PATCH)
                for x in range(PATCH)
                for channel in range(3)
            ]
    return (sum(errors) / len(errors)).item()


def test_the_loss_is_that_of_normalised_pixels_of_masked_patches() -> None:
    from pretraining.mae import masked_loss

    images, masked = random_images(2), torch.tensor([[3, 16, 1], [7, 8, 9]])
    predicted = torch.randn(2, 3, 3 * PATCH**2, generator=torch.Generator().manual_seed(5))
    actual = masked_loss(predicted, images, masked, PATCH).item()
    assert actual == pytest.approx(reference_loss(predicted, images, masked), rel=1e-5)


def test_patches_are_in_the_order_of_timms_embedding() -> None:
    from lightly.models.utils import patchify

    embedding, images = tiny_vit().patch_embed, random_images(2)
    weight = embedding.proj.weight.permute(0, 2, 3, 1).flatten(1)  # row, column, channel
    torch.testing.assert_close(F.linear(patchify(images, PATCH), weight, embedding.proj.bias), embedding(images))


def test_a_quarter_of_the_patches_and_cls_reach_the_encoder() -> None:
    from pretraining.mae import MAE

    model, images, seen = MAE(bundled_model()), random_images(5, 32), []
    model.vit.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    assert seen[0].shape == (5, 1 + 16, 192)
    tokens = model.vit._pos_embed(model.vit.patch_embed(images))
    assert torch.equal(seen[0][:, 0], tokens[:, 0])
    same = (seen[0][:, :, None] == tokens[:, None]).all(dim=3)  # each is one of the image's own, and none comes twice
    assert (same.sum(dim=2) == 1).all()
    assert (same.sum(dim=1) <= 1).all()


def test_masked_pixels_are_not_read() -> None:
    from pretraining.mae import MAE

    model, images = MAE(tiny_vit()), random_images(1)
    keep, masked = torch.tensor([[0, 1, 6]]), torch.tensor([[row for row in range(1, 17) if row not in (1, 6)]])
    expected = model.predict(images, keep, masked)
    unread = images.clone()
    unread[:, :, 8:] = 9.0  # rows 9 to 16
    assert torch.equal(model.predict(unread, keep, masked), expected)
    unread[:, :, 0, 0] = 9.0
    assert not torch.allclose(model.predict(unread, keep, masked), expected)


def test_predictions_are_made_where_they_are_scored() -> None:
    """An image whose patches say where they are is learnt only if predicted rows and scored rows agree."""
    from pretraining.mae import MAE

    torch.manual_seed(0)
    model = MAE(tiny_vit())
    images = random_images(1).expand(32, -1, -1, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(images)
        loss.backward()
        optimizer.step()
    assert loss < 0.3  # 1 is what the mean of each patch gives


# --- MoCo v3 ----------------------------------------------------------------------------------------------------------


def test_contrast_is_moco_v3s() -> None:
    from pretraining.mocov3 import contrast

    queries, keys = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).unbind()
    losses = []
    for row in range(4):
        scores = [torch.cosine_similarity(queries[row], key, dim=0).item() / 0.2 for key in keys]
        losses.append(math.log(sum(map(math.exp, scores))) - scores[row])
    assert contrast(queries, keys).item() == pytest.approx(2 * 0.2 * sum(losses) / 4, rel=1e-5)


def test_moco_v3_learns_on_one_side_and_follows_on_the_other() -> None:
    from pretraining.mocov3 import MoCoV3, contrast

    torch.manual_seed(0)
    model = MoCoV3(tiny_vit(), hidden=16, output=8)
    first, second = model.views(random_pixels(6))
    assert first.shape == second.shape == (6, 3, SIDE, SIDE)
    assert not torch.equal(first, second)
    loss = model(first, second)
    with torch.no_grad():
        keys = [model.target(view) for view in (first, second)]
        queries = [model.predictor(model.base(view)) for view in (first, second)]
        expected = contrast(queries[0], keys[1]) + contrast(queries[1], keys[0])
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    learning = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert {name.split(".")[0] for name in learning} == {"vit", "base", "predictor"}
    assert not {"vit.patch_embed.proj.weight", "vit.pos_embed"} & learning
    own, slow = model.vit.norm.weight, model.target[0].norm.weight
    before = slow.clone()
    with torch.no_grad():
        own += 1
    model.follow(0.0)
    torch.testing.assert_close(slow, 0.99 * before + 0.01 * own)
    model.follow(1.0)
    torch.testing.assert_close(slow, 0.99 * before + 0.01 * own)


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_crops_are_parts_of_the_right_size_and_flips_mirror() -> None:
    """On an image whose pixels say where they are."""
    from pretraining.augment import random_resized_crop

    place = (torch.arange(32) + 0.5) / 32 * 200
    where = torch.stack([place.expand(32, 32), place[:, None].expand(32, 32), torch.full((32, 32), 7.0)])
    torch.manual_seed(0)
    crops = random_resized_crop(where.expand(500, -1, -1, -1), 0.6)
    inner = crops[:, :, 8:24, 8:24] / 200  # away from the edges, which are padded
    slope_x = (inner[:, 0, :, -1] - inner[:, 0, :, 0]).mean(dim=1) / 15 * 32
    slope_y = (inner[:, 1, -1] - inner[:, 1, 0]).mean(dim=1) / 15 * 32
    area, aspect = slope_x.abs() * slope_y, slope_x.abs() / slope_y
    assert 0.55 < area.min() < 0.65
    assert 0.95 < area.max() <= 1.01
    assert aspect.min() > 0.74
    assert aspect.max() < 1.34
    assert slope_y.min() > 0
    assert 0.4 < (slope_x < 0).float().mean() < 0.6
    centre_x, half = inner[:, 0].mean(dim=(1, 2)), slope_x.abs() / 2
    assert ((centre_x - half > -0.01) & (centre_x + half < 1.01)).all()
    torch.testing.assert_close(crops[:, 2], torch.full_like(crops[:, 2], 7.0))


def test_saturation_and_hue_against_torchvision() -> None:
    from pretraining.augment import luma, turn_chroma

    images, ones = random_pixels(3).float() * 0.5 + 60, torch.ones(3)
    saturated = torch.stack([vision.adjust_saturation(image / 255, 0.7) * 255 for image in images])
    torch.testing.assert_close(turn_chroma(images, 0.7 * ones, 0 * ones), saturated, atol=0.1, rtol=0)
    grey = turn_chroma(images, 0 * ones, 0 * ones)
    torch.testing.assert_close(grey, luma(images).expand_as(images), atol=0.1, rtol=0)
    red = torch.tensor([200.0, 50.0, 50.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    turned = turn_chroma(red, torch.ones(1), torch.full((1,), -2 * math.pi / 3))[0, :, 0, 0]
    expected = vision.adjust_hue(red / 255, 1 / 3)[0, :, 0, 0]
    assert turned.argmax() == expected.argmax() == 1


def test_jitter_varies_between_images() -> None:
    from pretraining.augment import contrastive_view

    torch.manual_seed(0)
    views = contrastive_view(random_pixels(1).expand(40, -1, -1, -1), 1.0, solarize=0.2)
    assert views.shape == (40, 3, SIDE, SIDE)
    assert len({round(view.sum().item(), 2) for view in views}) == 40
    assert views.isfinite().all()


# --- images -----------------------------------------------------------------------------------------------------------


def test_an_archive_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretraining import pixels

    source = archive(tmp_path)
    images, digest = pixels.load_pixels(source, ["train", "test"], PREPROCESS, tmp_path / "cache")
    assert images.shape == (6, 3, SIDE, SIDE)
    assert images.dtype == torch.uint8
    whole = pixels.load_pixels(source, ["train"], Backbone.load(BUNDLED).spec.preprocess, tmp_path / "cache")[0]
    assert whole.shape == (5, 3, 32, 32)
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == [".npy"] * 2
    monkeypatch.setattr(pixels, "decode", None)
    again, same = pixels.load_pixels(source, ["train", "test"], PREPROCESS, tmp_path / "cache")
    assert same == digest
    assert torch.equal(again, images)


def test_images_of_the_right_size_are_kept_as_they_are(tmp_path: Path) -> None:
    from dataclasses import replace

    from pretraining.pixels import load_pixels

    scaling = replace(Backbone.load(BUNDLED).spec.preprocess, crop_pct=1.0)
    images, _ = load_pixels(archive(tmp_path), ["train"], scaling, tmp_path)
    for index, image in enumerate(images):
        expected = np.asarray(Image.open(io.BytesIO(jpeg(index)))).transpose(2, 0, 1)
        assert np.array_equal(image.numpy(), expected)


def test_a_folder_holds_the_same_images(tmp_path: Path) -> None:
    from pretraining.pixels import load_pixels

    source = archive(tmp_path)
    with tarfile.open(source) as tar:
        tar.extractall(tmp_path / "top" / "tiny-imagenet", filter="data")
    packed, _ = load_pixels(source, ["train", "test"], PREPROCESS, tmp_path)
    loose, _ = load_pixels(tmp_path / "top", ["train", "test"], PREPROCESS, tmp_path)
    assert {image.numpy().tobytes() for image in packed} == {image.numpy().tobytes() for image in loose}


def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretraining import pixels

    def refusal(source: Path, *splits: str) -> str:
        with pytest.raises(DataError) as caught:
            pixels.load_pixels(source, splits or ("train",), PREPROCESS, tmp_path / "cache")
        assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True
        return str(caught.value)

    assert refusal(tmp_path / "none.tar.xz").endswith("no such archive or folder")
    (tmp_path / "text.tar.xz").write_text("not an archive")
    assert "not a tar archive, or a damaged one" in refusal(tmp_path / "text.tar.xz")
    whole = archive(tmp_path, 30)
    (tmp_path / "cut.tar.xz").write_bytes(whole.read_bytes()[:-3000])
    assert "not a tar archive, or a damaged one" in refusal(tmp_path / "cut.tar.xz")
    assert refusal(whole, "trian", "tset").endswith("no images below trian/ or tset/")
    damaged = pack(tmp_path / "damaged.tar.xz", {"train/a.jpg": jpeg(0)[:200]})
    assert refusal(damaged).startswith("cannot read train/a.jpg: ")
    monkeypatch.setattr(pixels.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert "has 0 MB free" in refusal(whole)


# --- the run ----------------------------------------------------------------------------------------------------------


def recipe(epochs: int, method: str = "mae") -> object:
    from pretraining.loop import Recipe

    return Recipe(method, epochs, 16, 1e-3, (0.9, 0.95), 0.05, 0.25)


def make_run(folder: Path, epochs: int, method: str = "mae") -> object:
    from pretraining.loop import Run
    from pretraining.mae import MAE
    from pretraining.mocov3 import MoCoV3

    torch.manual_seed(0)
    model: nn.Module = MAE(tiny_vit()) if method == "mae" else MoCoV3(tiny_vit(), hidden=16, output=8)
    return Run(model, random_pixels(64), recipe(epochs, method), RunCheckpoint(folder, "tiny"), "data")


@pytest.mark.parametrize("method", ["mae", "mocov3"])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, method: str) -> None:
    def stop(epoch: object) -> None:
        if epoch.number == 2:
            raise KeyboardInterrupt

    for name in ("whole", "parts"):
        RunCheckpoint(tmp_path / name, "tiny").prepare()
    whole = make_run(tmp_path / "whole", 4, method)
    epochs = []
    whole.finish(epochs.append)
    assert [epoch.number for epoch in epochs] == [1, 2, 3, 4]
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path / "parts", 4, method).finish(stop)
    torch.manual_seed(99)  # what another process would have
    rest = make_run(tmp_path / "parts", 4, method)
    rest.resume()
    rest.finish(lambda _: None)
    assert rest.losses == whole.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], value), name
    with pytest.raises(UsageError, match="epochs was 4 and is 5"):
        make_run(tmp_path / "parts", 5, method).resume()


def test_the_schedule_warms_up_and_ends_at_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunCheckpoint(tmp_path, "tiny").prepare()
    run, rates = make_run(tmp_path, 4), []
    step = run.optimizer.step
    monkeypatch.setattr(run.optimizer, "step", lambda: (rates.append(run.optimizer.param_groups[0]["lr"]), step()))
    run.finish(lambda _: None)
    assert len(rates) == 16
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    cosine = [1e-3 * (1 + math.cos(math.pi * index / 11)) / 2 for index in range(12)]
    assert rates[4:] == pytest.approx(cosine, abs=1e-9)
    decayed = {group["weight_decay"]: group["params"] for group in run.optimizer.param_groups}
    assert set(decayed) == {0.0, 0.05}
    assert {weight.ndim for weight in decayed[0.05]} >= {2, 4}
    assert all(weight.ndim > 1 for weight in decayed[0.05])


def test_every_epoch_has_its_own_order_and_the_model_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunCheckpoint(tmp_path, "tiny").prepare()
    run, batches, done = make_run(tmp_path, 2), [], []
    views = run.model.views
    monkeypatch.setattr(run.model, "views", lambda images: batches.append(images) or views(images))
    monkeypatch.setattr(run.model, "follow", done.append)
    run.finish(lambda _: None)
    epochs = [torch.cat(batches[:4]), torch.cat(batches[4:])]
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert {image.numpy().tobytes() for image in epoch} == {image.numpy().tobytes() for image in random_pixels(64)}
    assert done == [step / 8 for step in range(8)]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, 2)
    with torch.no_grad():
        run.model.to_pixels.weight.fill_(float("nan"))
    with pytest.raises(UsageError, match="the loss of epoch 1 is nan: choose a lower --lr"):
        run.finish(lambda _: None)


# --- the weights ------------------------------------------------------------------------------------------------------


def trained_like(vit: VisionTransformer) -> VisionTransformer:
    """Weights that float16 holds exactly, so that what is read back is what was written."""
    with torch.no_grad():
        for weight in vit.parameters():
            weight.copy_((weight + 0.01 * torch.randn_like(weight)).half().float())
    return vit


@pytest.mark.parametrize(("family", "pool"), [("mae", "mean"), ("mocov3", "cls")])
def test_weights_load_as_a_backbone(tmp_path: Path, family: str, pool: str) -> None:
    from pretraining.mae import MAE
    from pretraining.mocov3 import MoCoV3
    from pretraining.probe import features
    from pretraining.result import save_weights

    torch.manual_seed(0)
    model = MAE(bundled_model()) if family == "mae" else MoCoV3(bundled_model(), hidden=8, output=4)
    vit, path = trained_like(model.vit).eval(), tmp_path / "weights.safetensors"
    save_weights(vit, family, path)
    shipped = Path(importlib.import_module("gpt_serve").__file__).parent / "backbones" / f"{BUNDLED}.safetensors"
    assert {name: (value.shape, value.dtype) for name, value in load_file(path).items()} == {
        name: (value.shape, value.dtype) for name, value in load_file(shipped).items()
    }
    backbone = Backbone.load(BUNDLED, checkpoint=path)
    assert (backbone.family, backbone.spec.pool) == (family, pool)
    pixels = random_pixels(3, 32)
    spec = backbone.spec.preprocess
    images = normalize(pixels, torch.tensor(spec.mean), torch.tensor(spec.std))
    everything = torch.arange(65).expand(3, -1)
    with torch.inference_mode():
        trained = model.encoder.encode(images, idx_keep=everything) if family == "mae" else vit.forward_features(images)
        torch.testing.assert_close(backbone.model.forward_features(images), trained)
        expected = vit(images) if pool == "cls" else vit.norm(_before_norm(vit, images)[:, 1:].mean(dim=1))
    torch.testing.assert_close(features(backbone, pixels), expected, rtol=1e-4, atol=1e-5)


def _before_norm(vit: VisionTransformer, images: Tensor) -> Tensor:
    return vit.blocks(vit._pos_embed(vit.patch_embed(images)))


# --- the command ------------------------------------------------------------------------------------------------------


def train(script: ModuleType, *arguments: object) -> Result:
    options = ["--epochs", "2", "--batch-size", "4", "--device", "cpu", *arguments]
    return CliRunner().invoke(script.main, ["train", *map(str, options)])


def test_the_command_leaves_weights_and_a_card(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretraining import job

    classes = {
        f"{split}/{name}/{index}.jpg": jpeg(index)
        for split in ("train", "test")
        for name in "ab"
        for index in range(10)
    }
    for name, content in classes.items():
        (tmp_path / "task" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "task" / name).write_bytes(content)
    result = train(script, "--data", archive(tmp_path), "--output", tmp_path / "out", "--probe", tmp_path / "task")
    assert result.exit_code == 0, result.output
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [["epoch", "1/2"], ["epoch", "2/2"]]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "6 images of images.tar.xz (train, test)" in text
    assert "| weights | task, k-NN (10) | task, linear probe |" in text
    assert not (tmp_path / "out" / ".train").exists()
    weights = tmp_path / "out" / "mae-vit-tiny-32.safetensors"
    table = CliRunner().invoke(
        script.main, ["evaluate", "--data", str(tmp_path / "task"), "--checkpoint", str(weights), "--device", "cpu"]
    )
    assert table.stdout.splitlines()[2].startswith("| bundled (35d41c0de108) |")
    assert len(table.stdout.splitlines()) == 4

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job.Run, "_epoch", interrupted)
    stopped = train(script, "--data", archive(tmp_path), "--output", tmp_path / "out")
    assert stopped.exit_code == 130
    assert "stopped after epoch 0: repeat the command with --resume to continue" in stopped.stderr


def test_mistakes_end_with_one_line(script: ModuleType, tmp_path: Path) -> None:
    def mistake(*arguments: object) -> str:
        result = train(script, *arguments)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        return result.stderr

    source, output = archive(tmp_path), ("--output", tmp_path / "out")
    assert "no such archive or folder" in mistake("--data", tmp_path / "none", *output)
    assert "--batch-size 7 is more than the 6 images there are" in mistake("--data", source, "--batch-size", 7, *output)
    assert "nothing to resume" in mistake("--data", source, "--resume", *output)
    (tmp_path / "out" / ".train").mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / ".train" / "mae-vit-tiny-32.pt").write_bytes(b"")
    assert "holds an interrupted run: add --resume" in mistake("--data", source, *output)
    assert "is damaged" in mistake("--data", source, "--resume", *output)
    result = CliRunner().invoke(script.main, ["evaluate", "--data", str(tmp_path), "--device", "cpu"])
    assert result.exit_code == 2
    assert "expected a folder train/" in result.stderr


def test_a_missing_library_is_named(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("pretraining", "lightly"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightly", None)
    result = train(script, "--data", tmp_path)
    assert result.exit_code == 2
    assert "pip install 'gpt-serve[pretrain]'" in result.stderr


@pytest.mark.slow
def test_the_loss_falls_on_real_images(shared_data: Path, tmp_path: Path) -> None:
    """240 images, half a minute of a core; predicting the mean of each patch gives a loss of 1."""
    from pretraining.loop import Recipe, Run
    from pretraining.mae import MAE
    from pretraining.pixels import load_pixels

    scaling = Backbone.load(BUNDLED).spec.preprocess
    pixels, _ = load_pixels(shared_data / "flowers12", ["test"], scaling, tmp_path)
    torch.manual_seed(0)
    steps = Recipe("mae", 12, 40, 1e-3, (0.9, 0.95), 0.05, 0.1)
    checkpoint = RunCheckpoint(tmp_path, "real")
    checkpoint.prepare()
    run = Run(MAE(bundled_model()), pixels, steps, checkpoint, "flowers")
    run.finish(lambda _: None)
    assert run.losses[0] > 1
    assert run.losses[-1] < 0.8
