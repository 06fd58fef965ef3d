"""The forward pass against the slow reference, against timm's own blocks, and row by row against itself."""

import copy
import dataclasses
from collections.abc import Sequence
from functools import cache

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.engine.slab import Packed, Slab, gather
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch, Layout
from gpt_serve.model.heads import read_taps
from gpt_serve.model.prompted import embed, prompted_features, remember, tapped_features
from gpt_serve.specs import Pool, Tap
from tests import reference
from tests.factories import make_adapter
from tests.tiny_vit import KINDS, METHODS, random_images, random_tensors, tiny_backbone, tiny_kind

VITS = {
    "plain": {},
    "registers": {"reg_tokens": 3},
    "dinov2": {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.5},
    "no-embed-class": {"no_embed_class": True},
    "qk-norm": {"qk_norm": True},
    "scale-norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "clip": {"pre_norm": True},
    "no-bias": {"qkv_bias": False},
    "no-final-norm": {"final_norm": False},
    "fc-norm": {"global_pool": "avg"},
    "no-cls": {"class_token": False, "global_pool": "avg"},
}
WITH_POOL = [(vit, pool) for vit in VITS for pool in ("cls", "mean") if (vit, pool) != ("no-cls", "cls")]


INF = float("inf")


@cache
def deeper_vit(name: str) -> Backbone:
    return tiny_backbone(depth=4, **VITS[name])


@cache
def vit(name: str) -> Backbone:
    return tiny_backbone(**VITS[name])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@cache
def kind(name: str) -> Backbone:
    return tiny_kind(name)


def single(backbone: Backbone, pool: Pool, tensors: dict[str, Tensor]) -> AdapterBatch:
    return AdapterBatch.single(depth=backbone.spec.depth, width=backbone.spec.width, pool=pool, **tensors)


def features(backbone: Backbone, images: Tensor, adapter: AdapterBatch) -> Tensor:
    return prompted_features(backbone.model, embed(backbone.model, images), adapter)


def slow(backbone: Backbone, image: Tensor, pool: Pool, tensors: dict[str, Tensor]) -> reference.Result:
    """The reference with an identity head."""
    identity = torch.eye(backbone.spec.width, dtype=image.dtype)
    head = {"head_weight": identity, "head_bias": torch.zeros_like(identity[0])}
    return reference.forward(backbone.timm_model, image, pool=pool, **head, **tensors)


def method_tensors(backbone: Backbone, method: str, **options: int) -> dict[str, Tensor]:
    return random_tensors(method, backbone.spec.depth, backbone.spec.width, **options)


# Against the reference


def check_block_by_block(backbone: Backbone, images: Tensor, tensors: dict[str, Tensor], adapter: AdapterBatch) -> None:
    """Every row that there is, and that none is missing which somebody reads."""
    tokens = embed(backbone.model, images)
    blocks: list[Tensor] = []
    actual = prompted_features(backbone.model, tokens, adapter, lambda index, x: blocks.append(x))
    body, layout = tokens.shape[1], adapter.layout
    pool = "cls" if layout.reads_class_token_last else "mean"
    for index, x in enumerate(blocks[:-1]):
        assert x.shape[1] == body + (adapter.prompts if index >= layout.entry else 0)
    assert blocks[-1].shape[1] == (1 if pool == "cls" else body + adapter.prompts)
    for row, image in enumerate(images):
        expected = slow(backbone, image, pool, tensors)
        for block, trace in zip(blocks, expected.blocks, strict=True):
            close(block[row], torch.cat([trace.prefix, trace.patches, trace.prompts])[: block.shape[1]])
        close(actual[row], expected.feature)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "pool"), WITH_POOL)
def test_tokens_equal_the_reference_block_by_block(name: str, pool: Pool, method: str) -> None:
    tensors = method_tensors(vit(name), method)
    check_block_by_block(vit(name), random_images(2), tensors, single(vit(name), pool, tensors))


@pytest.mark.parametrize("method", METHODS)
def test_bundled_backbone_equals_the_reference_block_by_block(bundled: Backbone, method: str) -> None:
    tensors = method_tensors(bundled, method)
    check_block_by_block(bundled, random_images(1, side=32), tensors, single(bundled, "mean", tensors))


@torch.inference_mode()
@pytest.mark.parametrize("name", KINDS)
def test_kind_without_prompts_equals_timm(name: str) -> None:
    backbone, images = kind(name), random_images(3)
    actual = features(backbone, images, single(backbone, backbone.spec.pool, {}))
    torch.testing.assert_close(actual, backbone.timm_model(images), rtol=0, atol=3e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "pool"), [(name, pool) for name in KINDS for pool in kind(name).spec.pools])
def test_kind_equals_the_reference(name: str, pool: Pool, method: str) -> None:
    """Prompts unrotated, patches rotated; remembered keys and values are therefore exact."""
    backbone, images = kind(name), random_images(2)
    tensors = method_tensors(backbone, method)
    none = {"prompt": None, "gamma": None, "tau": None}
    stored = AdapterBatch.of(make_adapter(backbone.spec, pool=pool, **none | tensors), backbone.spec, "cpu")
    for adapter in (single(backbone, pool, tensors), stored, remember(backbone.model, stored)):
        actual = features(backbone, images, adapter)
        for row, image in enumerate(images):
            close(actual[row], slow(backbone, image, pool, tensors).feature)


GATES = {  # of four blocks: gate, closed, remembered with shallow prompts under CLS and mean pooling
    "all closed": ((-INF, -INF, -INF), 4, 3),
    "closed first": ((-INF, 0.3, -INF), 1, 1),
    "closed later": ((0.3, -INF, -INF), 0, 0),
    "closed between": ((INF, -INF, 0.3), 0, 0),
    "underflow": ((-200.0, -200.0, 0.3), 2, 2),
}


@pytest.mark.parametrize("remembering", [False, True])
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("name", ["plain", "dinov2", "qk-norm", "no-bias", "scale-norm"])
def test_closed_gates_leave_rows_out_and_change_nothing(
    name: str, gates: str, pool: Pool, layers: int, remembering: bool
) -> None:
    """A file's gates: what is exactly 0 is known, and what it makes needless is not computed."""
    backbone = deeper_vit(name)
    gamma, cls_blocks, mean_blocks = GATES[gates]
    random = method_tensors(backbone, "gated-deep" if layers > 1 else "gated")
    tensors = random | {"gamma": torch.tensor(gamma)}
    adapter = AdapterBatch.of(make_adapter(backbone.spec, pool=pool, **tensors), backbone.spec, "cpu")
    assert adapter.layout.closed == tuple(value <= -200 for value in gamma)
    if remembering:
        adapter = remember(backbone.model, adapter)
        assert len(adapter.kv) == (cls_blocks if pool == "cls" else mean_blocks)
    check_block_by_block(backbone, random_images(2), tensors, adapter)


@pytest.mark.parametrize("remembering", [False, True])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("method", ["gated", "vpt-shallow", "vpt-deep", "gated-deep", "gated-hard"])
def test_prompts_that_enter_a_later_block(method: str, first: int, pool: Pool, remembering: bool) -> None:
    """Fig. 1: blocks before it compute the image alone, those after it as if the model began there."""
    backbone = deeper_vit("plain")
    tensors = method_tensors(backbone, method, first_block=first)
    fields = {"gamma": None, "tau": None} | tensors
    adapter = AdapterBatch.of(make_adapter(backbone.spec, pool=pool, **fields), backbone.spec, "cpu")
    if remembering:
        adapter = remember(backbone.model, adapter)
        read_only = {"cls": 4, "mean": 3}[pool] - first  # blocks that never write deep prompts
        assert method != "vpt-deep" or len(adapter.kv) == read_only
    check_block_by_block(backbone, random_images(2), tensors, adapter)


def test_prompts_that_enter_late_cost_nothing_before(tiny: Backbone) -> None:
    tokens, flops = embed(tiny.model, random_images(1)), []
    for first in (0, 1, 2):
        adapter = single(tiny, "mean", method_tensors(tiny, "vpt-shallow", prompts=16, first_block=first))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            prompted_features(tiny.model, tokens, adapter)
        flops.append(counter.get_total_flops())
    bare = single(tiny, "mean", {})
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        prompted_features(tiny.model, tokens, bare)
    of_a_block = flops[0] - flops[1]
    assert flops == [counter.get_total_flops() + blocks * of_a_block for blocks in (3, 2, 1)]


def everything_read(layout: Layout) -> Layout:
    """All gates open, and the mean over all rows read."""
    last = len(layout.closed)
    return dataclasses.replace(layout, closed=(False,) * last, taps=(Tap(last, "mean"),))


def test_closed_gates_save_the_work_that_they_promise(tiny: Backbone) -> None:
    """FLOPs per block: a closed gate costs keys, values and their part of the scores; a remembered one the scores."""
    tensors = method_tensors(tiny, "gated", prompts=16) | {"gamma": torch.tensor([-INF, -INF])}
    closed = AdapterBatch.of(make_adapter(tiny.spec, pool="cls", **tensors), tiny.spec, "cpu")
    variants = {
        "open": dataclasses.replace(closed, layout=everything_read(closed.layout)),
        "closed": closed,
        "remembered": remember(tiny.model, closed),
    }
    tokens = embed(tiny.model, random_images(1))
    flops = {}
    for name, adapter in variants.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            prompted_features(tiny.model, tokens, adapter)
        flops[name] = counter.get_total_flops()
    width, body, prompts, blocks = tiny.spec.width, tokens.shape[1], 16, 3
    keys_and_values = blocks * 2 * prompts * 2 * width**2
    assert flops["closed"] - flops["remembered"] == keys_and_values
    linear = (body * 12 + prompts * 2) * 2 * width**2  # of a closed block
    scores = 2 * 2 * body * (body + prompts) * width
    last = ((body + prompts) * 2 + 10) * 2 * width**2 + 2 * 2 * (body + prompts) * width
    assert flops["closed"] == 2 * (linear + scores) + last
    assert flops["open"] > 1.5 * flops["closed"]


def test_eq_8_gives_what_the_last_block_reads() -> None:
    backbone = tiny_backbone(depth=6)
    tensors = method_tensors(backbone, "gated")
    images = random_images(2)
    blocks: list[Tensor] = []
    tokens = embed(backbone.model, images)
    prompted_features(backbone.model, tokens, single(backbone, "mean", tensors), lambda index, x: blocks.append(x))
    gates = tensors["gamma"].sigmoid().tolist()
    for row, image in enumerate(images):
        outputs = [trace.prompts_out for trace in slow(backbone, image, "mean", tensors).blocks[:-1]]
        close(blocks[-2][row, tokens.shape[1] :], reference.last_input(tensors["prompt"][0], gates, outputs))


def test_eq_10_and_11_by_hand() -> None:
    assert reference.written_weights([0.5, 0.25, 0.5]) == [0.5 * 0.75 * 0.5, 0.25 * 0.5, 0.5]
    assert reference.selection_ratio([0.5, 0.5]) == pytest.approx([1 / 3, 2 / 3])
    assert reference.selection_ratio([1.0, 1.0]) == [0.0, 1.0]  # an open gate forgets all that came before


# Training: gradients and steps

Learned = dict[str, Tensor]


def learned_tensors(backbone: Backbone, method: str) -> Learned:
    """A method's tensors and a head of 4 classes, all wanting gradients."""
    generator = torch.Generator().manual_seed(3)
    tensors = method_tensors(backbone, method)
    tensors["head_weight"] = 0.3 * torch.randn(4, backbone.spec.width, generator=generator)
    tensors["head_bias"] = torch.zeros(4)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def fast_logits(backbone: Backbone, images: Tensor, learned: Learned) -> Tensor:
    tensors = {name: tensor for name, tensor in learned.items() if not name.startswith("head")}
    rows = features(backbone, images, single(backbone, "mean", tensors))
    return F.linear(rows, learned["head_weight"], learned["head_bias"])


def slow_logits(backbone: Backbone, images: Tensor, learned: Learned) -> Tensor:
    return torch.stack([reference.forward(backbone.model, image, pool="mean", **learned).logits for image in images])


def test_gradient_reaches_the_adapter_and_nothing_else() -> None:
    backbone = tiny_backbone()
    learned = learned_tensors(backbone, "gated")
    F.cross_entropy(fast_logits(backbone, random_images(4), learned), torch.arange(4)).backward()
    assert set(learned) == {"prompt", "gamma", "tau", "head_weight", "head_bias"}
    for name, tensor in learned.items():
        assert tensor.grad is not None and tensor.grad.abs().min() > 0, name
    assert all(weight.grad is None for weight in backbone.model.parameters())


@pytest.mark.parametrize("method", ["linear", "vpt-shallow", "vpt-deep", "gated", "gated-deep"])
def test_five_steps_of_sgd_follow_the_reference(tiny: Backbone, method: str) -> None:
    images, labels = random_images(4), torch.arange(4)
    trajectories = []
    for logits in (fast_logits, slow_logits):
        learned = learned_tensors(tiny, method)
        optimizer = torch.optim.SGD(learned.values(), lr=0.1, momentum=0.9)
        trajectories.append([])
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(logits(tiny, images, learned), labels).backward()
            optimizer.step()
            trajectories[-1].append({name: tensor.detach().clone() for name, tensor in learned.items()})
    start = learned_tensors(tiny, method)
    for name in start:
        assert not torch.allclose(trajectories[0][-1][name], start[name], atol=1e-3), f"{name} did not move"
        for fast, expected in zip(*trajectories, strict=True):
            close(fast[name], expected[name])


# Temperatures


@pytest.mark.parametrize(("tau", "bound"), [(12.0, 10.0), (0.001, 0.01), (-1.0, 0.01)])
def test_temperatures_are_clamped(tiny: Backbone, tau: float, bound: float) -> None:
    tensors = method_tensors(tiny, "gated")
    beyond, at_bound = (
        features(tiny, random_images(2), single(tiny, "mean", tensors | {"tau": torch.full((3,), value)}))
        for value in (tau, bound)
    )
    assert torch.equal(beyond, at_bound)


@pytest.mark.parametrize("bound", [0.01, 10.0])
def test_a_temperature_at_its_bound_still_learns(tiny: Backbone, bound: float) -> None:
    """The authors clamp the parameter itself: its gradient is not cut off there."""
    tau = torch.full((3,), bound, requires_grad=True)
    tensors = method_tensors(tiny, "gated") | {"tau": tau}
    features(tiny, random_images(2), single(tiny, "mean", tensors)).square().sum().backward()
    assert tau.grad is not None and tau.grad.abs().min() > 0


def test_the_coldest_and_hottest_blocks_equal_the_reference() -> None:
    """In float64: scores a hundred times as large leave float32 four digits."""
    backbone = tiny_backbone()
    backbone.model.double()
    tensors = method_tensors(backbone, "gated") | {"tau": torch.tensor([0.01, 10.0, 0.3])}
    double = {name: tensor.double() for name, tensor in tensors.items()}
    check_block_by_block(backbone, random_images(2).double(), double, single(backbone, "mean", double))


# Published methods, computed with timm's own blocks


def vpt(backbone: Backbone, images: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """VPT (Jia et al., 2022), CLS feature: ``layers[l]`` (P, D) replaces the prompts before block ``l``."""
    model = backbone.timm_model
    x = embed(backbone.model, images)
    count = len(layers[0])
    x = torch.cat([x[:, :1], layers[0].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    for index, blk in enumerate(model.blocks):
        if 0 < index < len(layers):
            x = torch.cat([x[:, :1], layers[index].expand(len(x), -1, -1), x[:, 1 + count :]], dim=1)
        x = blk(x)
    return model.norm(x)[:, 0]


@pytest.mark.parametrize("gamma", [None, float("inf")])
def test_open_gates_are_vpt_shallow(tiny: Backbone, gamma: float | None) -> None:
    prompt = method_tensors(tiny, "vpt-shallow")["prompt"]
    gates = {} if gamma is None else {"gamma": torch.full((2,), gamma), "tau": torch.ones(3)}
    images = random_images(3)
    close(features(tiny, images, single(tiny, "cls", {"prompt": prompt} | gates)), vpt(tiny, images, prompt))


@pytest.mark.parametrize("gamma", [None, float("-inf")])
def test_deep_prompts_are_vpt_deep(tiny: Backbone, gamma: float | None) -> None:
    prompt = method_tensors(tiny, "vpt-deep")["prompt"]
    gates = {} if gamma is None else {"gamma": torch.full((2,), gamma), "tau": torch.ones(3)}
    images = random_images(3)
    close(features(tiny, images, single(tiny, "cls", {"prompt": prompt} | gates)), vpt(tiny, images, prompt))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_closed_gates_are_vpt_deep_with_tied_prompts(tiny: Backbone, pool: Pool) -> None:
    prompt = method_tensors(tiny, "vpt-shallow")["prompt"]
    images = random_images(3)
    closed = {"prompt": prompt, "gamma": torch.full((2,), float("-inf")), "tau": torch.ones(3)}
    tied = {"prompt": prompt.expand(3, -1, -1)}
    close(features(tiny, images, single(tiny, pool, closed)), features(tiny, images, single(tiny, pool, tied)))
    if pool == "cls":
        close(features(tiny, images, single(tiny, pool, closed)), vpt(tiny, images, tied["prompt"]))


# Without prompts: timm's own forward pass


def timm_features(model: timm.models.VisionTransformer, images: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images), pre_logits=True)


@pytest.mark.parametrize("name", VITS)
def test_no_prompts_equals_timm(name: str) -> None:
    """``fc-norm`` and ``no-cls`` are timm models that pool by the mean, the others by CLS."""
    model = vit(name).timm_model
    pool: Pool = "mean" if model.global_pool == "avg" else "cls"
    images = random_images(3)
    close(features(vit(name), images, single(vit(name), pool, {})), timm_features(model, images))


def test_bundled_backbone_without_prompts_equals_timm_with_mean_pooling(bundled: Backbone) -> None:
    """timm's mean pooling keeps the norm under another name, ``fc_norm``, and applies it after the pooling too."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=0, global_pool="avg"
    ).eval()
    weights = bundled.model.state_dict()
    renamed = {f"fc_{name}" if name.startswith("norm.") else name: value for name, value in weights.items()}
    model.load_state_dict(renamed)
    images = random_images(2, side=32)
    with torch.no_grad():
        expected = timm_features(model, images)
    close(features(bundled, images, single(bundled, "mean", {})), expected)


def test_bundled_backbone_without_prompts_equals_timm_with_cls_pooling(bundled: Backbone) -> None:
    images = random_images(2, side=32)
    close(features(bundled, images, single(bundled, "cls", {})), timm_features(bundled.timm_model, images))


# Adapters side by side in one forward pass


def zoo(backbone: Backbone) -> list[Adapter]:
    """Adapters of every method, with different prompt counts, layers and pools."""
    kinds: list[tuple[str, int, Pool]] = [
        ("gated", 5, "mean"),
        ("vpt-deep", 2, "mean"),
        ("linear", 0, "mean"),
        ("gated-hard", 3, "cls"),
        ("vpt-shallow", 7, "mean"),
        ("gated-deep", 4, "cls"),
        ("linear", 0, "cls"),
        ("gated", 1, "mean"),
    ]
    return [
        make_adapter(
            backbone.spec,
            pool=pool,
            **{"prompt": None, "gamma": None, "tau": None}
            | method_tensors(backbone, method, prompts=prompts, seed=10 + seed),
        )
        for seed, (method, prompts, pool) in enumerate(kinds)
    ]


TRAFFIC = {
    "distinct": [0, 1, 2, 3, 4, 5, 6, 7],
    "uniform": [3, 7, 0, 3, 5, 1, 6, 2, 4, 0, 6, 5],
    "skewed": [4, 4, 1, 4, 4, 4, 2, 4, 5, 4],
    "identical": [5, 5, 5, 5, 5, 5],
    "shallow only": [0, 4, 7, 3],
    "deep only": [1, 5, 1],
    "same length": [2, 6],
}


def side_by_side(backbone: Backbone, adapters: Sequence[Adapter], images: Tensor) -> list[Tensor]:
    """The features of each image with its adapter, all in one forward pass."""
    slab = Slab(backbone.spec, 1000 * 4 * backbone.spec.width, "cpu")
    packed = [Packed.of(adapter, backbone.spec) for adapter in adapters]
    places = [slab.reserve(item, remembered=0) for item in packed]
    for place, item in zip(places, packed, strict=True):
        slab.write(place, item)
    batch = gather(places)
    tapped = tapped_features(backbone.model, embed(backbone.model, images), batch)
    wanted = [adapter.taps_of(backbone.spec.depth) for adapter in adapters]
    return [read_taps(tapped, batch.layout.taps, taps, slice(row, row + 1))[0] for row, taps in enumerate(wanted)]


def alone(backbone: Backbone, adapter: Adapter, image: Tensor) -> Tensor:
    return features(backbone, image[None], AdapterBatch.of(adapter, backbone.spec, "cpu"))[0]


@pytest.mark.parametrize("traffic", TRAFFIC)
def test_a_mixed_batch_equals_one_at_a_time(tiny: Backbone, traffic: str) -> None:
    adapters = [zoo(tiny)[row] for row in TRAFFIC[traffic]]
    images = random_images(len(adapters))
    mixed = side_by_side(tiny, adapters, images)
    for row, adapter, image in zip(mixed, adapters, images, strict=True):
        close(row, alone(tiny, adapter, image))


def test_a_mixed_batch_on_the_bundled_backbone_equals_one_at_a_time(bundled: Backbone) -> None:
    adapters = zoo(bundled)
    images = random_images(len(adapters), side=32)
    mixed = side_by_side(bundled, adapters, images)
    for row, adapter, image in zip(mixed, adapters, images, strict=True):
        close(row, alone(bundled, adapter, image))


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_for_all_rows_equals_one_per_row(tiny: Backbone, method: str) -> None:
    adapter = make_adapter(tiny.spec, **{"prompt": None, "gamma": None, "tau": None} | method_tensors(tiny, method))
    images = random_images(3)
    expected = features(tiny, images, AdapterBatch.of(adapter, tiny.spec, "cpu"))
    for row, one in zip(side_by_side(tiny, [adapter] * 3, images), expected, strict=True):
        close(row, one)


# Taps, shifts, images that rows share


TAPS = (Tap(1, "cls"), Tap(0, "patches"), Tap(3, "mean"), Tap(3, "cls"), Tap(2, "grid"), Tap(1, "raw"))


@pytest.mark.parametrize("remembering", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_taps_read_what_the_reference_has_after_their_blocks(method: str, remembering: bool) -> None:
    backbone = deeper_vit("dinov2")
    tensors = method_tensors(backbone, method)
    fields = {"prompt": None, "gamma": None, "tau": None} | tensors
    adapter = AdapterBatch.of(make_adapter(backbone.spec, taps=TAPS, **fields), backbone.spec, "cpu")
    adapter = remember(backbone.model, adapter) if remembering else adapter
    images = random_images(2)
    tapped = tapped_features(backbone.model, embed(backbone.model, images), adapter)
    for row, image in enumerate(images):
        traces = slow(backbone, image, "mean", tensors).blocks
        for tap, actual in zip(TAPS, tapped, strict=True):
            trace = traces[tap.block]
            expected = {
                "cls": trace.prefix[0],
                "patches": trace.patches.mean(dim=0),
                "mean": torch.cat([trace.patches, trace.prompts_out]).mean(dim=0),
                "grid": trace.patches,
                "raw": trace.patches,
            }[tap.pool]
            close(actual[row], expected if tap.pool == "raw" else backbone.model.norm(expected))


def test_blocks_behind_the_last_tap_are_not_computed(tiny: Backbone) -> None:
    adapter = single(tiny, "cls", method_tensors(tiny, "gated") | {"taps": (Tap(1, "cls"), Tap(0, "patches"))})
    computed: list[int] = []
    tapped_features(tiny.model, embed(tiny.model, random_images(1)), adapter, lambda index, x: computed.append(index))
    assert computed == [0, 1]


@pytest.mark.parametrize("method", ["linear", "gated", "vpt-deep", "gated-deep"])
@pytest.mark.parametrize("name", ["plain", "dinov2", "no-bias"])
def test_shifts_are_what_edited_biases_do(name: str, method: str) -> None:
    """`prompted.block`: biases of values, projection, second norm and second MLP layer are three vectors a block."""
    backbone = deeper_vit(name)
    edited = copy.deepcopy(backbone.timm_model)
    shift = torch.stack([reference.edit_biases(block, seed) for seed, block in enumerate(edited.blocks)])
    tensors = method_tensors(backbone, method)
    images = random_images(2)
    actual = features(backbone, images, single(backbone, "mean", tensors | {"shift": shift}))
    other = tiny_backbone(depth=4, **VITS[name])
    other.timm_model = edited
    for row, image in enumerate(images):
        torch.testing.assert_close(actual[row], slow(other, image, "mean", tensors).feature, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("traffic", ["all", "linear", "late"])
def test_rows_may_share_images(traffic: str) -> None:
    """Three images, each for every task: blocks that no task touches compute three rows, and nothing changes."""
    backbone = deeper_vit("plain")
    adapters = shared_tasks(backbone, traffic)
    images, depth = random_images(3), backbone.spec.depth
    slab = Slab(backbone.spec, 1000 * 4 * backbone.spec.width, "cpu")
    places = []
    for adapter in adapters:
        packed = Packed.of(adapter, backbone.spec)
        places.append(slab.reserve(packed, remembered=0))
        slab.write(places[-1], packed)
    which = torch.arange(3).repeat_interleave(len(adapters))
    batch = dataclasses.replace(gather(places * 3), images=which)
    rows: list[int] = []
    tokens = embed(backbone.model, images)
    tapped = tapped_features(backbone.model, tokens, batch, lambda index, x: rows.append(len(x)))
    assert rows == [3] * batch.layout.trunk + [len(which)] * (depth - batch.layout.trunk)
    assert batch.layout.trunk == {"all": 0, "linear": 4, "late": 2}[traffic]
    for row, image in enumerate(which.tolist()):
        adapter = adapters[row % len(adapters)]
        wanted = adapter.taps_of(depth)
        actual = read_taps(tapped, batch.layout.taps, wanted, slice(row, row + 1))[0]
        torch.testing.assert_close(actual, alone(backbone, adapter, images[image]), rtol=1e-6, atol=1e-6)


def shared_tasks(backbone: Backbone, traffic: str) -> list[Adapter]:
    """Adapters that touch every block, none, or those from the third on."""
    bare = {"prompt": None, "gamma": None, "tau": None}
    linear = [make_adapter(backbone.spec, **bare), make_adapter(backbone.spec, taps=(Tap(1, "cls"),), **bare)]
    late = [
        make_adapter(backbone.spec, **bare | method_tensors(backbone, method, first_block=2))
        for method in ("vpt-shallow", "vpt-deep")
    ]
    return {"all": [*zoo(backbone)[:2], *linear], "linear": linear, "late": [*late, *linear]}[traffic]
