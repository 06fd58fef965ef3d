"""Mixed batches: each row as if it were alone, and as the slow reference computes it."""

import gc
import io
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import FILE_NAME, AdapterStore
from gpt_serve.engine import classify as classify_module
from gpt_serve.engine import engine as engine_module
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine, Features, Forward, ImageInput, Row, TorchForward, planner_for
from gpt_serve.engine.onnx import FasterForward, OnnxForward, serving_graph
from gpt_serve.errors import (
    BackboneMismatch,
    GPTServeError,
    ImageTooLarge,
    InvalidAdapter,
    InvalidTaskName,
    UndecodableImage,
    UnknownTask,
    UnsupportedImage,
    UsageError,
)
from gpt_serve.export.session import Graph
from gpt_serve.images.decode import ImageLimits
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import BackboneSpec
from tests import reference
from tests.factories import make_adapter, make_unknown, remove_adapter
from tests.tiny_vit import tiny_backbone

Request = tuple[str, ImageInput]


def adapters_of(spec: BackboneSpec) -> list[Adapter]:
    """Adapters that differ in everything that rows of one batch may differ in."""
    grey = replace(spec.preprocess, mean=(0.1, 0.4, 0.7), std=(0.2, 0.5, 0.9))
    unknown, other = make_unknown(spec.width), make_unknown(spec.width, seed=1)
    return [
        make_adapter(spec, "linear", method="linear", classes=3, seed=1),
        make_adapter(spec, "linear-cls", method="linear", classes=5, pool="cls", seed=2),
        make_adapter(spec, "shallow", method="vpt-shallow", prompts=7, classes=2, seed=3),
        make_adapter(spec, "deep", method="vpt-deep", prompts=2, classes=11, preprocess=grey, seed=4, unknown=unknown),
        make_adapter(spec, "deep-cls", method="vpt-deep", prompts=5, classes=4, pool="cls", seed=5),
        make_adapter(spec, "gated", method="gated", prompts=1, classes=6, seed=6, unknown=other),
        make_adapter(spec, "gated-cls", method="gated", prompts=9, classes=4, pool="cls", preprocess=grey, seed=7),
        make_adapter(spec, "hard", method="gated-hard", prompts=4, classes=8, seed=8),
        make_adapter(spec, "gated-deep", method="gated", deep=True, prompts=3, classes=3, seed=9),
    ]


TRAFFIC = {
    "distinct": list(range(9)),
    "uniform": [(5 * index + 2) % 9 for index in range(18)],
    "skewed": [6, 6, 3, 6, 6, 0, 6, 6, 8, 6, 6, 6],
    "identical": [6] * 5,
    "identical without prompts": [1] * 4,
    "one of each kind": [0, 3, 6],
}


def whole_image(spec: BackboneSpec) -> BackboneSpec:
    """Without the crop: an image of the input size is only normalised."""
    return replace(spec, preprocess=replace(spec.preprocess, crop_pct=1.0))


def pixels(seed: int, height: int, width: int) -> Tensor:
    """uint8 (3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def stored(root: Path, adapters: Sequence[Adapter]) -> AdapterStore:
    store = AdapterStore(root)
    for adapter in adapters:
        store.publish(adapter)
    return store


@pytest.fixture
def store(tiny: Backbone, tmp_path: Path) -> AdapterStore:
    return stored(tmp_path, adapters_of(tiny.spec))


@pytest.fixture(params=["torch", "onnx"])
def engine(request: pytest.FixtureRequest, tiny: Backbone, store: AdapterStore) -> Engine:
    forward = faster(tiny, request.getfixturevalue("tiny_graph")) if request.param == "onnx" else None
    return Engine(tiny, store, forward=forward)


def faster(backbone: Backbone, graph: Graph | None = None) -> Forward:
    """What a server with the onnx engine runs."""
    onnx = OnnxForward(graph or serving_graph(backbone))
    return FasterForward(onnx, TorchForward(backbone), planner_for(backbone))


def answers(results: Sequence[Prediction | GPTServeError]) -> list[Prediction]:
    assert all(isinstance(result, Prediction) for result in results), results
    return [result for result in results if isinstance(result, Prediction)]


def check_same(actual: Prediction, expected: Prediction) -> None:
    assert (actual.task, actual.revision, actual.labels) == (expected.task, expected.revision, expected.labels)
    torch.testing.assert_close(actual.probabilities, expected.probabilities, rtol=1e-5, atol=1e-5)
    assert actual.known == pytest.approx(expected.known, abs=0.051)  # a knot more or less


def check_reference(result: Prediction, backbone: Backbone, adapter: Adapter, image: Tensor) -> None:
    """``image`` has the backbone's input size: nothing is scaled, only normalised."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (adapter.preprocess.mean, adapter.preprocess.std))
    expected = reference.forward(
        backbone.model,
        (image.float() / 255 - mean) / std,
        pool=adapter.pool,
        head_weight=adapter.head_weight,
        head_bias=adapter.head_bias,
        prompt=adapter.prompt,
        gamma=adapter.gamma,
        tau=adapter.tau,
    )
    assert result.labels == adapter.labels
    torch.testing.assert_close(result.probabilities, expected.logits.softmax(dim=0), rtol=1e-5, atol=1e-5)
    assert (result.known is None) == (adapter.unknown is None)
    if adapter.unknown is not None:
        unknown, offset = adapter.unknown, expected.feature - adapter.unknown.mean
        distance = (unknown.scale * offset).square().sum() - (unknown.basis @ offset).square().sum()
        shares = [(unknown.knots >= factor * distance).float().mean().item() for factor in (0.9999, 1, 1.0001)]
        assert result.known in [round(share, 4) for share in shares] and result.unknown == (result.known < 0.05)


# A batch is its rows


@pytest.mark.parametrize("traffic", TRAFFIC)
def test_mixed_batch_equals_one_at_a_time(engine: Engine, traffic: str) -> None:
    tasks = [adapters_of(engine.backbone.spec)[index].task for index in TRAFFIC[traffic]]
    requests: list[Request] = [(task, pixels(seed, 16 + seed, 40 - seed)) for seed, task in enumerate(tasks)]
    mixed = answers(engine.predict(requests))
    assert [result.task for result in mixed] == tasks
    for request, result in zip(requests, mixed, strict=True):
        check_same(result, answers(engine.predict([request]))[0])


@pytest.mark.parametrize("traffic", TRAFFIC)
def test_mixed_batch_equals_the_reference(engine: Engine, traffic: str) -> None:
    adapters = [adapters_of(engine.backbone.spec)[index] for index in TRAFFIC[traffic]]
    images = [pixels(seed, 16, 16) for seed in range(len(adapters))]
    results = engine.predict([(adapter.task, image) for adapter, image in zip(adapters, images, strict=True)])
    for result, adapter, image in zip(answers(results), adapters, images, strict=True):
        check_reference(result, engine.backbone, adapter, image)


@pytest.mark.parametrize("forward", [TorchForward, pytest.param(faster, marks=pytest.mark.slow)])
def test_bundled_backbone_equals_the_reference(
    bundled: Backbone, tmp_path: Path, forward: Callable[[Backbone], Forward]
) -> None:
    # Random heads as they are would make every answer certain.
    adapters = [replace(item, head_weight=0.1 * item.head_weight) for item in adapters_of(whole_image(bundled.spec))]
    engine = Engine(bundled, stored(tmp_path, adapters), forward=forward(bundled))
    images = [pixels(seed, 32, 32) for seed in range(len(adapters))]
    results = engine.predict([(adapter.task, image) for adapter, image in zip(adapters, images, strict=True)])
    for result, adapter, image in zip(answers(results), adapters, images, strict=True):
        check_reference(result, bundled, adapter, image)


def test_answers_say_what_they_know_of_strangers_where_adapters_can_tell(engine: Engine) -> None:
    able, other = answers(engine.predict([("deep", pixels(1, 20, 30)), ("linear", pixels(2, 20, 30))]))
    assert able.to_dict(1).keys() == {"task", "revision", "predictions", "known", "unknown"}
    assert (other.known, other.unknown) == (None, None)
    assert other.to_dict(1).keys() == {"task", "revision", "predictions"}


def test_probabilities_are_ready_to_use(engine: Engine) -> None:
    for result in answers(engine.predict([("gated", pixels(1, 20, 30)), ("deep", pixels(2, 20, 30))])):
        assert result.probabilities.dtype == torch.float32
        assert result.probabilities.shape == (len(result.labels),)
        assert result.probabilities.sum().item() == pytest.approx(1, abs=1e-6)
        assert not result.probabilities.requires_grad


@pytest.mark.parametrize("max_batch", [1, 2, 5, 7, 100])
def test_long_lists_are_computed_in_parts(engine: Engine, store: AdapterStore, max_batch: int) -> None:
    tasks = [adapter.task for adapter in adapters_of(engine.backbone.spec)]
    requests: list[Request] = [(tasks[seed % 9], pixels(seed, 18, 22)) for seed in range(11)]
    requests[4] = ("nobody", pixels(4, 18, 22))
    parts = Engine(engine.backbone, store, max_batch=max_batch, forward=engine.forward).predict(requests)
    whole = engine.predict(requests)
    assert isinstance(parts[4], UnknownTask)
    for index in set(range(11)) - {4}:
        check_same(answers([parts[index]])[0], answers([whole[index]])[0])


def test_empty_list(engine: Engine) -> None:
    assert engine.predict([]) == []


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"max_batch": -3}, {"bank_bytes": 0}, {"host_bytes": -1}], ids=str
)
def test_engine_that_could_not_answer(tiny: Backbone, store: AdapterStore, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="use a max_batch of 1 or more|cannot work: use more"):
        Engine(tiny, store, **options)


def test_more_tasks_in_a_batch_than_fit_into_the_bank(tiny: Backbone, store: AdapterStore) -> None:
    small, large = Engine(tiny, store, bank_bytes=40 * 4 * tiny.spec.width), Engine(tiny, store)
    requests: list[Request] = [(adapter.task, pixels(1, 16, 16)) for adapter in adapters_of(tiny.spec)]
    for actual, expected in zip(answers(small.predict(requests)), answers(large.predict(requests)), strict=True):
        check_same(actual, expected)
    assert len(small.bank) < len(large.bank) == 9
    assert small.bank.stats().evictions > 0


def test_half_precision_rounds_the_same_answers(tiny: Backbone, store: AdapterStore) -> None:
    half = tiny_backbone()
    half.cast(torch.bfloat16)
    requests: list[Request] = [
        (adapter.task, pixels(seed, 16, 16)) for seed, adapter in enumerate(adapters_of(tiny.spec))
    ]
    rounded, exact = (answers(Engine(backbone, store).predict(requests)) for backbone in (half, tiny))
    for one, other in zip(rounded, exact, strict=True):
        assert one.probabilities.dtype == torch.float32
        assert 0 < (one.probabilities - other.probabilities).abs().max() < 0.1


# Images


def test_bytes_pillow_and_tensors_agree(engine: Engine) -> None:
    image = pixels(3, 25, 31)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    lazy = Image.open(io.BytesIO(png(image)))
    inputs: list[ImageInput] = [png(image), pillow, lazy, image, image.permute(1, 2, 0).contiguous().permute(2, 0, 1)]
    results = answers(engine.predict([("gated", item) for item in inputs]))
    for result in results[1:]:
        assert torch.equal(result.probabilities, results[0].probabilities)


def test_orientation_is_the_adapters_wish(tiny: Backbone, tmp_path: Path) -> None:
    plain = replace(tiny.spec.preprocess, exif=False)
    adapters = [make_adapter(tiny.spec, "upright"), make_adapter(tiny.spec, "as-stored", preprocess=plain)]
    engine = Engine(tiny, stored(tmp_path, adapters))
    image = pixels(4, 16, 16)
    exif = Image.Exif()
    exif[0x0112] = 3
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG", exif=exif)
    turned = answers(engine.predict([("upright", buffer.getvalue()), ("as-stored", buffer.getvalue())]))
    expected = answers(engine.predict([("upright", image.rot90(2, (1, 2))), ("as-stored", image)]))
    for actual, other in zip(turned, expected, strict=True):
        check_same(actual, other)


# Bad items


def broken_store(tiny: Backbone, store: AdapterStore) -> None:
    (store.root / "broken").mkdir()
    (store.root / "broken" / FILE_NAME).write_bytes(b"not an adapter")
    store.publish(make_adapter(tiny.spec, "foreign", backbone_sha256="cd" * 32))


GOOD = png(pixels(9, 20, 20))
BAD: dict[str, tuple[Request, type[GPTServeError]]] = {
    "unknown task": (("nobody", GOOD), UnknownTask),
    "invalid name": (("../gated", GOOD), InvalidTaskName),
    "empty name": (("", GOOD), InvalidTaskName),
    "broken adapter": (("broken", GOOD), InvalidAdapter),
    "foreign adapter": (("foreign", GOOD), BackboneMismatch),
    "no bytes": (("gated", b""), UnsupportedImage),
    "garbage": (("gated", b"GIF89a" + bytes(100)), UnsupportedImage),
    "truncated": (("gated", GOOD[: len(GOOD) // 2]), UndecodableImage),
    "truncated and lazy": (("gated", Image.open(io.BytesIO(GOOD[: len(GOOD) // 2]))), UndecodableImage),
    "too large": (("gated", png(torch.zeros(3, 300, 300, dtype=torch.uint8))), ImageTooLarge),
    "float tensor": (("gated", torch.rand(3, 16, 16)), UndecodableImage),
    "grey tensor": (("gated", torch.zeros(1, 16, 16, dtype=torch.uint8)), UndecodableImage),
    "batch of tensors": (("gated", torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), UndecodableImage),
    "channels last": (("gated", torch.zeros(16, 16, 3, dtype=torch.uint8)), UndecodableImage),
    "empty tensor": (("gated", torch.zeros(3, 0, 16, dtype=torch.uint8)), UndecodableImage),
    "array": (("gated", pixels(1, 16, 16).numpy()), UndecodableImage),  # type: ignore[dict-item]
    "path": (("gated", "photo.png"), UndecodableImage),  # type: ignore[dict-item]
    "nothing": (("gated", None), UndecodableImage),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_item_yields_its_error_and_disturbs_no_other(tiny: Backbone, store: AdapterStore, bad: str) -> None:
    broken_store(tiny, store)
    engine = Engine(tiny, store, limits=ImageLimits(max_pixels=200 * 200))
    request, error = BAD[bad]
    others: list[Request] = [("gated", pixels(1, 20, 30)), ("deep", GOOD), ("gated-cls", pixels(2, 16, 16))]
    alone = answers(engine.predict(others))
    for place in range(4):
        results = engine.predict([*others[:place], request, *others[place:]])
        problem = results.pop(place)
        assert type(problem) is error
        assert len(str(problem).splitlines()) == 1
        for actual, expected in zip(answers(results), alone, strict=True):
            check_same(actual, expected)


def test_batch_of_nothing_but_bad_items(tiny: Backbone, store: AdapterStore) -> None:
    broken_store(tiny, store)
    engine = Engine(tiny, store, limits=ImageLimits(max_pixels=200 * 200))
    results = engine.predict([request for request, _ in BAD.values()])
    assert [type(result) for result in results] == [error for _, error in BAD.values()]


def test_images_sent_to_a_broken_adapter_are_not_kept(tiny: Backbone, store: AdapterStore) -> None:
    broken_store(tiny, store)
    engine = Engine(tiny, store)
    image = pixels(1, 16, 16)
    kept = weakref.ref(image)
    engine.predict([("broken", image)])
    del image
    gc.collect()
    assert kept() is None


# Revisions


def test_revision_is_the_files(engine: Engine, store: AdapterStore) -> None:
    for adapter in adapters_of(engine.backbone.spec):
        (result,) = answers(engine.predict([(adapter.task, GOOD)]))
        assert result.revision == store.load(adapter.task).revision


def test_new_replaced_and_removed_adapters_take_effect_at_once(engine: Engine, store: AdapterStore) -> None:
    spec = engine.backbone.spec
    assert isinstance(engine.predict([("late", GOOD)])[0], UnknownTask)
    for seed, classes in ((1, 3), (2, 8)):
        adapter = make_adapter(spec, "late", seed=seed, classes=classes)
        revision = store.publish(adapter)
        image = pixels(seed, 16, 16)
        (result,) = answers(engine.predict([("late", image)]))
        assert result.revision == revision
        check_reference(result, engine.backbone, adapter, image)
    remove_adapter(store, "late")
    assert isinstance(engine.predict([("late", GOOD)])[0], UnknownTask)


def test_all_rows_of_a_batch_answer_with_one_revision(
    engine: Engine, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is replaced, and another removed, while the batch's images are prepared."""
    old = next(adapter for adapter in adapters_of(engine.backbone.spec) if adapter.task == "gated")
    revision = store.load("gated").revision
    new = make_adapter(engine.backbone.spec, "gated", seed=77, prompts=6, classes=3)
    replaced: list[str] = []
    prepare = engine_module.preprocess_image

    lock = threading.Lock()

    def replace_first(*args: object) -> Tensor:
        with lock:
            if not replaced:
                replaced.append(store.publish(new))
                remove_adapter(store, "deep")
        return prepare(*args)

    monkeypatch.setattr(engine_module, "preprocess_image", replace_first)
    images = [pixels(seed, 16, 16) for seed in range(6)]
    requests: list[Request] = [("gated", image) for image in images]
    results = answers(engine.predict([*requests, ("deep", images[0])]))
    for result, image in zip(results[:6], images, strict=True):
        assert result.revision == revision
        check_reference(result, engine.backbone, old, image)
    results = answers(engine.predict(requests))
    for result, image in zip(results, images, strict=True):
        assert result.revision == replaced[0] != revision
        check_reference(result, engine.backbone, new, image)
    assert isinstance(engine.predict([("deep", images[0])])[0], UnknownTask)


# Prediction


def prediction(*probabilities: float) -> Prediction:
    labels = tuple("abcdefgh"[: len(probabilities)])
    return Prediction("alpha", "0" * 12, labels, torch.tensor(probabilities))


def test_top_is_sorted_and_clipped() -> None:
    result = prediction(0.125, 0.5, 0.25, 0.0625, 0.0625)
    assert result.top(3) == [("b", 0.5), ("c", 0.25), ("a", 0.125)]
    assert result.top(1) == [("b", 0.5)]
    assert [label for label, _ in result.top(5)][:3] == ["b", "c", "a"]
    assert len(result.top(1000)) == 5
    assert result.top(0) == []
    assert all(type(value) is float for _, value in result.top(5))


def test_adapter_without_cls_token(tmp_path: Path) -> None:
    backbone = tiny_backbone(class_token=False, global_pool="avg")
    adapters = [item for item in adapters_of(backbone.spec) if item.pool == "mean"]
    engine = Engine(backbone, stored(tmp_path, adapters))
    image = pixels(5, 16, 16)
    for result, adapter in zip(
        answers(engine.predict([(item.task, image) for item in adapters])), adapters, strict=True
    ):
        check_reference(result, backbone, adapter, image)


def test_many_tasks_of_one_image_are_what_each_says_alone(engine: Engine) -> None:
    image, other = png(pixels(5, 40, 30)), png(pixels(6, 20, 20))
    tasks = [adapter.task for adapter in adapters_of(engine.backbone.spec)]
    together = engine.predict([(tasks, image), ((*tasks[:3], "unknown"), other), (("deep", "deep"), b"broken")])
    for task, answer in zip(tasks, answers(together[0]), strict=True):
        alone = answers(engine.predict([(task, image)]))[0]
        assert answer.task == task
        torch.testing.assert_close(answer.probabilities, alone.probabilities, rtol=1e-6, atol=1e-6)
    assert isinstance(together[1][3], UnknownTask) and len(answers(together[1][:3])) == 3
    assert [type(answer) for answer in together[2]] == [UnsupportedImage] * 2


def test_an_image_is_decoded_once_for_its_tasks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []

    def noting(image: bytes, *rest: object, **options: object) -> Tensor:
        decoded.append(image)
        return pixels(1, 20, 20)

    monkeypatch.setattr(engine_module, "decode", noting)
    image = png(pixels(5, 40, 30))
    engine.predict([(("linear", "linear-cls", "shallow"), image), ("deep", image), ("linear", bytes(bytearray(image)))])
    assert len(decoded) == 2  # `deep` is normalised in another way


def test_blocks_that_no_task_touches_compute_an_image_once(tiny: Backbone, tmp_path: Path) -> None:
    tasks = [f"linear-{number}" for number in range(5)]
    store = stored(tmp_path, [make_adapter(tiny.spec, task, method="linear", seed=7) for task in tasks])
    rows: list[int] = []

    class Counting(TorchForward):
        def __init__(self, backbone: Backbone) -> None:
            super().__init__(backbone)
            run, self.run_block = self.run_block, lambda blk, x, *rest: rows.append(len(x)) or run(blk, x, *rest)

    with Engine(tiny, store, forward=Counting(tiny)) as engine:
        engine.predict([(tasks, pixels(1, 20, 20)), (tasks, pixels(2, 20, 20))])
    assert rows == [2] * tiny.spec.depth


def test_a_task_is_looked_up_once_even_when_the_bank_is_full(tiny: Backbone, tmp_path: Path) -> None:
    """Its answers name one revision, though it is replaced while they are computed and asked for again at the end."""
    store = stored(tmp_path, [make_adapter(tiny.spec, task, prompts=8) for task in "abc"])

    class Replacing(TorchForward):
        def __call__(self, rows: Sequence[Row]) -> Features:
            store.publish(make_adapter(tiny.spec, "a", prompts=8, seed=9))
            return super().__call__(rows)

    with Engine(tiny, store, forward=Replacing(tiny), bank_bytes=18 * 4 * tiny.spec.width) as engine:
        results = answers(engine.predict([(task, pixels(1, 20, 20)) for task in "abcabca"]))
        assert engine.bank.stats().resident == 1
    assert [result.task for result in results] == list("abcabca")
    assert len({result.revision for result in results if result.task == "a"}) == 1


def test_a_closed_engine_has_no_threads(tiny: Backbone, store: AdapterStore) -> None:
    before = set(threading.enumerate())
    with Engine(tiny, store) as engine:
        engine.predict([("linear", pixels(1, 20, 20))])
        own = {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("decode")}
        assert own
    assert not any(thread.is_alive() for thread in own)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_probabilities_that_are_no_numbers_are_the_adapters_fault(tmp_path: Path) -> None:
    """Weights may be finite and yet so large that scores overflow; its batch-mates do not notice."""
    tiny = tiny_backbone()
    store = AdapterStore(tmp_path, tiny.spec)
    good, huge = (make_adapter(tiny.spec, task) for task in ("good", "huge"))
    store.publish(good)
    store.publish(replace(huge, head_weight=torch.full_like(huge.head_weight, 3e38)))
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    answers = Engine(tiny, store).predict([("good", image), ("huge", image), ("good", image)])
    assert [type(answer) for answer in answers] == [Prediction, InvalidAdapter, Prediction]
    assert "'huge'" in str(answers[1])


# Heads


def test_heads_of_one_shape_share_a_product(tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tasks of two shapes, one of them with two rows and one with a head that is not worth the copy."""
    adapters = [
        make_adapter(tiny.spec, f"task-{seed}", method="linear", classes=4 + seed % 2, seed=seed) for seed in range(8)
    ]
    adapters.append(make_adapter(tiny.spec, "large", method="linear", classes=40, seed=8))
    engine = Engine(tiny, stored(tmp_path, adapters))
    monkeypatch.setitem(classify_module.SMALL_HEAD, "cpu", 39 * tiny.spec.width)
    shared: list[int] = []
    linear_each = classify_module.linear_each

    def counted(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shared.append(len(weight))
        return linear_each(features, weight, bias)

    monkeypatch.setattr(classify_module, "linear_each", counted)
    requests: list[Request] = [(adapter.task, pixels(seed, 16, 16)) for seed, adapter in enumerate(adapters)]
    requests.append(("task-0", pixels(20, 16, 16)))
    together = answers(engine.predict(requests))
    assert sorted(shared) == [3, 4], "task-0 has two rows"
    for request, result in zip(requests, together, strict=True):
        check_same(result, answers(engine.predict([request]))[0])
