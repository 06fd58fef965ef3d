"""What prompts cost: timm's own forward pass against the prompted one, on the same images."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt_serve.bench.inputs import untrained_adapter
from gpt_serve.bench.timing import Plan, Row, interleave, to_rows
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.prompted import embed, prompted_features

BATCHES = (1, 8, 32)
PROMPTS = (0, 10, 50, 100)
BARE = "timm"


def bench_forward(
    backbone: Backbone, plan: Plan, batches: Sequence[int] = BATCHES, prompts: Sequence[int] = PROMPTS
) -> list[Row]:
    """One comparison per batch size: bare, and gated prompts of each length (none: the linear probe)."""
    passes: dict[str, Callable[[Tensor], object]] = {BARE: backbone.model}
    passes |= {f"prompted, P = {count}": _prompted(backbone, count) for count in prompts}
    one = torch.zeros(1, 3, *backbone.spec.preprocess.input_size, device=backbone.device)
    bare = flops(backbone.model, one)
    extra = {name: {"FLOP ratio": flops(run, one) / bare} for name, run in passes.items()}
    rows = []
    for batch in batches:
        images = torch.randn(batch, 3, *backbone.spec.preprocess.input_size).to(backbone.device)
        variants = {name: _finished(run, images) for name, run in passes.items()}
        times = interleave(variants, plan)
        rows += to_rows("forward", backbone.name, f"batch {batch}", batch, times, extra)
    return rows


def _prompted(backbone: Backbone, count: int) -> Callable[[Tensor], object]:
    adapter = untrained_adapter(backbone, "bench", "gated" if count else "linear", count)
    tensors = AdapterBatch.of(adapter, backbone.spec, backbone.device)
    return lambda images: prompted_features(backbone.model, embed(backbone.model, images), tensors)


def _finished(run: Callable[[Tensor], object], images: Tensor) -> Callable[[], None]:
    """``run(images)`` as serving runs it, waiting for a GPU to be done."""

    @torch.inference_mode()
    def call() -> None:
        run(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)

    return call


def flops(run: Callable[[Tensor], object], images: Tensor) -> int:
    """Floating-point operations of ``run(images)`` in its matrix products, attention and convolutions."""
    # As plain matrix products: not every version counts the fused kernels of every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.inference_mode():
        run(images)
    total: int = counter.get_total_flops()
    return total
