"""The torch-free runner as a library: preprocessing, single-task graphs, banks, hostile files, providers."""

import io
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from gpt_serve.adapters import parse
from gpt_serve.adapters.adapter import revision_of
from gpt_serve.images.decode import decode, from_pil
from gpt_serve.images.headers import orientation
from gpt_serve.images.preprocess import preprocess_image
from gpt_serve.specs import Preprocess
from tests.export.stand_in import LABELS, multi, multi_probabilities, single, single_probabilities, some_adapters
from tests.factories import TINY_SPEC, make_adapter
from tests.hostile_adapters import Hostile, hostile_adapters, pack, unpack
from tests.hostile_images import encode, fixed_cases, photo, png_chunk

EXPORT = Path(__file__).parents[2] / "export"
sys.path.insert(0, str(EXPORT))
import bank  # noqa: E402
import run  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocess(size: tuple[int, int] = (224, 224), crop_pct: float = 0.9, **fields: Any) -> Preprocess:
    values = {"crop_mode": "center", "interpolation": "bicubic", "mean": MEAN, "std": STD} | fields
    return Preprocess(size, crop_pct, **values)


CONFIGS = [
    preprocess(),
    preprocess(crop_pct=0.875, interpolation="bilinear"),
    preprocess((32, 32), 1.0),
    preprocess((160, 96)),
    preprocess((96, 224), interpolation="bilinear"),
    preprocess((64, 48), 0.5, crop_mode="squash"),
]


# preprocessing


def compare(images: list[Image.Image], config: Preprocess) -> None:
    """At most 2 of 255 levels from the server's preprocessing, by any in 1 of 30 values."""
    differences = []
    for image in images:
        found = run.prepare(image, config.to_dict())
        expected = preprocess_image(from_pil(image, exif=config.exif), config).permute(1, 2, 0).numpy()
        assert (found.dtype, found.shape) == (np.uint8, (*config.input_size, 3))
        differences.append(np.abs(found.astype(int) - expected).ravel())
    difference = np.concatenate(differences)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 1 / 30


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.input_size}-{config.crop_mode}")
def test_preprocessing_is_the_servers(config: Preprocess) -> None:
    sizes = [(1, 1), (3, 5), (224, 224), (500, 333), (333, 500), (249, 255), (31, 400), (1000, 63)]
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    compare([Image.fromarray(noise), *(photo(*size) for size in sizes)], config)


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (1001, 7), (1000, 3), (3, 1001), (20_000, 350)])
def test_long_sides_lose_their_ends_as_in_the_server(size: tuple[int, int]) -> None:
    for config in CONFIGS:
        if config.crop_mode == "center":
            compare([photo(*size)], config)


@pytest.mark.slow
def test_preprocessing_of_real_images_is_the_servers(shared_data: Path) -> None:
    files = sorted(shared_data.glob("flowers12/test/*/*.jpg"))[::40]
    assert files
    compare([run.open_image(file) for file in files], preprocess((32, 32), 1.0))


@pytest.mark.parametrize("turn", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(kind: str, turn: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(kind, photo(), exif=exif)
    (tmp_path / "image").write_bytes(data)
    for wanted in (True, False):
        found = np.asarray(run.to_rgb(run.open_image(tmp_path / "image"), exif=wanted))
        assert np.array_equal(found, decode(data, exif=wanted).permute(1, 2, 0))


@pytest.mark.filterwarnings("ignore")  # Pillow's, on entries that lie outside the file
def test_orientation_is_read_as_in_the_server_whatever_its_type() -> None:
    rng, seen = np.random.default_rng(0), set()
    for _ in range(2000):
        order, count = rng.choice(["<", ">"]), int(rng.choice([0, 1, 1, 1, 2, 5]))
        values = rng.choice([*range(10), 255], 12).astype(f"{order}u{rng.choice([1, 2, 4, 8])}").tobytes()
        place = values[:4] if rng.random() < 0.7 else struct.pack(order + "I", 26)
        entry = struct.pack(order + "HHI", 0x0112, rng.integers(1, 18), count) + place
        head = b"II*\0" if order == "<" else b"MM\0*"
        exif = b"Exif\0\0" + head + struct.pack(order + "IH", 8, 1) + entry + bytes(4) + values
        image = Image.new("L", (2, 1))
        image.info["exif"] = exif
        ours, servers = (value if 2 <= value <= 8 else 1 for value in (run.read_orientation(image), orientation(exif)))
        assert ours == servers, exif
        seen.add(ours)
    assert seen == set(range(1, 9))


def test_exif_behind_the_pixels_and_damaged_exif() -> None:
    late = png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    data = encode("PNG")
    for content, size in (
        (data[:-12] + late + data[-12:], (48, 64)),
        (encode("JPEG", photo(), exif=b"Exif\0\0XX\0*\0\0\0\x08\0\0"), (64, 48)),
    ):
        assert run.to_rgb(Image.open(io.BytesIO(content)), exif=True).size == size


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBX", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"])
def test_modes_are_converted_as_in_the_server(mode: str) -> None:
    if mode.startswith("I"):
        wide = np.arange(64 * 48, dtype=np.int32).reshape(48, 64) * 21
        image = Image.fromarray(wide).convert(mode)
    else:
        image = photo().convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))))
    image.info |= {"P": {"transparency": 3}, "I": {"transparency": 21}, "L": {"transparency": 9}}.get(mode, {})
    found = np.asarray(run.to_rgb(image, exif=True))
    assert np.array_equal(found, from_pil(image).permute(1, 2, 0))


# single-task graphs


def some_pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def as_images(pixels: np.ndarray) -> list[Image.Image]:
    """Images that preprocessing leaves as they are."""
    return [Image.fromarray(image) for image in pixels]


@pytest.mark.parametrize("kind", ["uint8", "float"])
@pytest.mark.parametrize("output", ["probabilities", "logits"])
def test_every_form_of_single_graph_gives_probabilities(tmp_path: Path, kind: str, output: str) -> None:
    config = preprocess((16, 16), 1.0)  # a mean and std that differ by channel
    model = run.Model(single(tmp_path / "g.onnx", kind=kind, output=output, preprocess=config))
    pixels = some_pixels(4)
    answers = model.predict(as_images(pixels))
    expected = single_probabilities(pixels, preprocess=config)
    assert np.allclose([answer.probabilities for answer in answers], expected, atol=1e-5)
    assert [answer.task.name for answer in answers] == ["flowers"] * 4


@pytest.mark.parametrize(("known", "stranger"), [(0.97, False), (0.05, False), (0.0499, True), (0.0, True)])
def test_a_graph_that_can_tell_strangers_says_so(tmp_path: Path, known: float, stranger: bool) -> None:
    model = run.Model(single(tmp_path / "g.onnx", known=known))
    pixels = some_pixels(2)
    answers = model.predict(as_images(pixels))
    assert [(answer.known, answer.unknown) for answer in answers] == [(pytest.approx(known), stranger)] * 2
    assert np.allclose([answer.probabilities for answer in answers], single_probabilities(pixels), atol=1e-5)


def test_a_graph_that_cannot_tell_strangers_says_nothing_of_them(tmp_path: Path) -> None:
    (answer,) = run.Model(single(tmp_path / "g.onnx")).predict(as_images(some_pixels(1)))
    assert (answer.known, answer.unknown) == (None, None)


def test_top_gives_labels_best_first(tmp_path: Path) -> None:
    (answer,) = run.Model(single(tmp_path / "g.onnx")).predict(as_images(some_pixels(1)))
    best = answer.top(2)
    expected = sorted(zip(LABELS, answer.probabilities.tolist(), strict=True), key=lambda pair: -pair[1])
    assert best == expected[:2]
    assert len(answer.top(1000)) == 3


def test_batches_are_bounded_and_images_are_taken_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = run.Model(single(tmp_path / "g.onnx")), []
    outputs = model.outputs
    monkeypatch.setattr(model, "outputs", lambda pixels, index: (sizes.append(len(pixels)), outputs(pixels, index))[1])
    pixels = some_pixels(2 * run.BATCH + 3)

    def images() -> Any:
        for number, image in enumerate(as_images(pixels)):
            assert sum(sizes) == number // run.BATCH * run.BATCH
            yield image

    answers = model.predict(images())
    assert sizes == [run.BATCH, run.BATCH, 3]
    assert np.allclose([answer.probabilities for answer in answers], single_probabilities(pixels), atol=1e-5)


# multi-task graphs


@pytest.mark.parametrize("deep", [False, True])
def test_a_mixed_batch_equals_each_task_alone(tmp_path: Path, deep: bool) -> None:
    adapters = {adapter.task: adapter for adapter in some_adapters(deep)}
    model = run.Model(multi(tmp_path / "m.onnx", list(adapters.values()), deep=deep))
    assert list(model.tasks) == sorted(adapters)
    names = [*adapters, *reversed(adapters), "hard"]
    pixels = some_pixels(len(names))
    answers = model.predict(as_images(pixels), names)
    for name, image, answer in zip(names, pixels, answers, strict=True):
        (expected,) = multi_probabilities(adapters[name], image[None])
        assert (answer.task.name, tuple(answer.task.labels)) == (name, adapters[name].labels)
        assert answer.task.revision == revision_of(adapters[name].to_bytes())
        assert np.allclose(answer.probabilities, expected, atol=1e-5)


def test_the_bank_has_the_contracts_shapes_and_padding(tmp_path: Path) -> None:
    model = run.Model(multi(tmp_path / "m.onnx", some_adapters(deep=True), deep=True))
    assert {name: (array.shape, str(array.dtype)) for name, array in model.bank.items()} == {
        "prompt": ((6, 3, 7, 16), "float32"),
        "counts": ((6,), "int64"),
        "gate": ((6, 2), "float32"),
        "tau": ((6, 3), "float32"),
        "is_deep": ((6,), "bool"),
        "head_weight": ((6, 9, 16), "float32"),
        "head_bias": ((6, 9), "float32"),
    }
    order = {name: row for row, name in enumerate(model.tasks)}
    assert model.bank["counts"][[order["gated"], order["probe"], order["vpt"]]].tolist() == [4, 0, 2]
    assert model.bank["gate"][order["vpt"]].tolist() == [0, 0]
    assert model.bank["gate"][order["shallow"]].tolist() == model.bank["gate"][order["probe"]].tolist() == [1, 1]
    assert model.bank["gate"][order["hard"]].tolist() == [1, 0]
    assert model.bank["tau"][order["probe"]].tolist() == [1, 1, 1]
    assert model.bank["head_bias"][order["probe"], 2:].tolist() == [-np.inf] * 7
    assert np.flatnonzero(model.bank["is_deep"]).tolist() == sorted([order["vpt"], order["zz"]])
    assert not model.bank["prompt"][order["shallow"], 1:].any()


def test_a_bank_of_linear_probes_has_one_empty_prompt(tmp_path: Path) -> None:
    probe = make_adapter(task="probe", method="linear")
    model = run.Model(multi(tmp_path / "m.onnx", [probe]))
    assert model.bank["prompt"].shape == (1, 1, 1, 16)
    (answer,) = model.predict(as_images(some_pixels(1)))
    assert np.allclose(answer.probabilities, multi_probabilities(probe, some_pixels(1))[0], atol=1e-5)


def test_only_the_asked_tasks_are_read(tmp_path: Path) -> None:
    path = multi(tmp_path / "m.onnx", some_adapters(deep=False))
    (tmp_path / "m.bank" / "broken.safetensors").write_bytes(b"not an adapter")
    model = run.Model(path, ["probe"])
    assert list(model.tasks) == ["probe"]
    assert model.bank["head_weight"].shape == (1, 2, 16)
    with pytest.raises(run.RunnerError, match="broken.safetensors is refused"):
        run.Model(path)


def test_an_added_file_is_a_task(tmp_path: Path) -> None:
    path = multi(tmp_path / "m.onnx", some_adapters(deep=False))
    (tmp_path / "m.bank" / "new.safetensors").write_bytes(make_adapter(task="new").to_bytes())
    assert "new" in run.Model(path).tasks


def test_an_adapter_of_the_resized_weights_is_of_the_same_backbone(tmp_path: Path) -> None:
    path = multi(tmp_path / "m.onnx", [make_adapter(replace(TINY_SPEC, fingerprint="ef" * 32), task="old")])
    with pytest.raises(run.RunnerError, match="trained on backbone"):
        run.Model(path)
    model = onnx.load(path)
    model.metadata_props.add(key="resized_sha256", value="ef" * 32)
    onnx.save(model, path)
    assert list(run.Model(path).tasks) == ["old"]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_other_float_types(tmp_path: Path, dtype: str) -> None:
    adapter = make_adapter(task="alpha")
    model = run.Model(multi(tmp_path / "m.onnx", [adapter]))
    header, body = unpack(adapter.to_bytes())
    metadata, new, parts = header.pop("__metadata__"), {}, []
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        values = torch.frombuffer(bytearray(body[start:end]), dtype=torch.float32).to(kinds[dtype])
        begin = sum(map(len, parts))
        parts.append(values.view(torch.uint8).numpy().tobytes())
        new[name] = {"dtype": dtype, "shape": entry["shape"], "data_offsets": [begin, begin + len(parts[-1])]}
    data = pack({"__metadata__": metadata} | new, b"".join(parts))
    (tmp_path / "m.bank" / "alpha.safetensors").write_bytes(data)
    again = run.Model(tmp_path / "m.onnx")
    assert again.tasks["alpha"].revision == revision_of(data)
    for name in ("prompt", "tau", "head_weight", "head_bias"):
        assert np.allclose(again.bank[name], model.bank[name], rtol=0.01)
        assert np.array_equal(again.bank[name], model.bank[name]) == (dtype == "F64")


@pytest.mark.parametrize("row", [-1, 4, 2**40])
def test_an_index_outside_of_the_bank_is_refused_before_the_run(tmp_path: Path, row: int) -> None:
    model = run.Model(multi(tmp_path / "m.onnx", some_adapters(deep=False)))
    with pytest.raises(run.RunnerError, match="use 0 to 3"):
        model.run(some_pixels(2), np.array([0, row]))


def test_tasks_must_be_named_and_known(tmp_path: Path) -> None:
    model = run.Model(multi(tmp_path / "m.onnx", some_adapters(deep=False)))
    images = as_images(some_pixels(2))
    with pytest.raises(run.RunnerError, match="several tasks, name one: gated, hard, probe, shallow"):
        model.predict(images)
    with pytest.raises(run.RunnerError, match="no task birds: there are gated, hard"):
        model.predict(images, ["gated", "birds"])
    with pytest.raises(ValueError, match="zip"):
        model.predict(images, ["gated"])


# What the runner never reads, and what only the store's folders can hold.
UNREAD = {"method-odd", "backbone-odd", "fingerprint-short", "created-odd", "created-elsewhere", "created-never"}
UNREAD |= {
    name for name in ("training-list", "training-twice", "training-nan", "training-infinite", "training-nesting")
}
CASES = {case.name: case for case in hostile_adapters(TINY_SPEC)}


@pytest.mark.parametrize(
    "case", [case for name, case in CASES.items() if name not in UNREAD], ids=lambda case: case.name
)
def test_hostile_bank_files_are_refused(tmp_path: Path, case: Hostile) -> None:
    path = multi(tmp_path / "m.onnx", [])
    case.put(tmp_path).rename(tmp_path / "m.bank" / f"{case.name}.safetensors")
    with pytest.raises(run.RunnerError, match=case.name) as refusal:
        run.Model(path)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400 + len(str(tmp_path))


def test_a_deep_adapter_is_refused_by_a_graph_for_shallow_ones(tmp_path: Path) -> None:
    path = multi(tmp_path / "m.onnx", [make_adapter(task="deep", method="vpt-deep")])
    with pytest.raises(run.RunnerError, match="the graph takes one layer"):
        run.Model(path)


def test_a_mutated_bank_file_is_read_or_refused() -> None:
    good, rng = make_adapter(task="alpha").to_bytes(), np.random.default_rng(0)
    outcomes = set()
    for _ in range(500):
        data = bytearray(good)
        for at in rng.integers(0, rng.choice([8, 1400, len(data)]), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        try:
            bank.parse(bytes(data)).tensors()
            outcomes.add("read")
        except bank.ParseError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_one_parser_reads_adapter_files_here_and_in_the_package() -> None:
    """``cp gpt_serve/adapters/parse.py export/adapter_file.py`` mends this."""
    assert Path(bank.parse.__code__.co_filename) == EXPORT / "adapter_file.py"
    assert (EXPORT / "adapter_file.py").read_bytes() == Path(parse.__file__).read_bytes()


# images and providers


def test_hostile_images_are_refused(tmp_path: Path) -> None:
    for case in fixed_cases():
        if case.name in ("too-many-bytes", "bomb-jpeg-scans", "format-newline-then-jpeg"):
            continue  # limits of the server, which takes files from strangers
        path = tmp_path / case.name
        path.write_bytes(case.data)
        with pytest.raises(run.RunnerError, match=case.name) as refusal:
            run.prepare(run.open_image(path), TINY_SPEC.preprocess.to_dict())
        assert "\n" not in str(refusal.value)


def test_the_session_is_asked_not_to_fall_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    class Session:
        def __init__(self, path: Path, options: Any, providers: list[str], enable_fallback: int) -> None:
            entry = "session.disable_cpu_ep_fallback"
            asked.append((options.get_session_config_entry(entry) if run.CPU not in providers else "", providers))

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", run.CPU]

    monkeypatch.setattr(run.ort, "InferenceSession", Session)
    monkeypatch.setattr(run.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "Other", run.CPU])
    path = single(tmp_path / "g.onnx")
    run.open_session(path, ["CUDAExecutionProvider"])
    run.open_session(path, ["CUDAExecutionProvider", run.CPU])
    assert asked == [("1", ["CUDAExecutionProvider"]), ("", ["CUDAExecutionProvider", run.CPU])]
    with pytest.raises(run.RunnerError, match="Other does not run here"):
        run.open_session(path, ["Other", run.CPU])
