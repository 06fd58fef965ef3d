"""The mutual information that prompts share with patch tokens along training.

Wang et al. (Self-Prompt Tuning, ICML 2024) look at it, but neither their code nor their abstract defines it. The
definition here is that of Park et al. (What Do Self-Supervised Vision Transformers Learn?, ICLR 2023) for
self-attention, with the prompts as queries and the patch tokens as keys: ``p(k|q)`` is a head's attention of prompt
``q`` on patch ``k``, normalised over the patches, ``p(q) = 1/P``, and

    NMI = I(q; k) / sqrt(H(q) H(k)).

0: all prompts look at the patches alike. 1: each looks at patches of its own. A single prompt has 0.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.errors import UsageError
from gpt_serve.insight.attention import by_block, embed_pixels
from gpt_serve.insight.figures import save_figure
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.train.data.views import View
from gpt_serve.train.methods.prompts import AdapterModule

IMAGES = 32  # validation images on which training measures


def normalized_mutual_information(conditional: Tensor) -> Tensor:
    """``I(q; k) / sqrt(H(q) H(k))`` with ``p(q) = 1/Q``; 0 where an entropy is.

    Args:
        conditional: (..., Q, K), ``p(k|q)``: rows sum to 1.

    Returns:
        (...) in [0, 1].
    """
    marginal = conditional.mean(dim=-2)
    entropy_k = -torch.xlogy(marginal, marginal).sum(dim=-1)
    mutual = entropy_k + torch.xlogy(conditional, conditional).sum(dim=-1).mean(dim=-1)  # H(k) - H(k|q)
    scale = (entropy_k * torch.tensor(conditional.shape[-2]).log()).sqrt()
    return torch.where(scale > 0, mutual / scale, 0.0)


def prompt_nmi(model: Any, tokens: Tensor, adapter: AdapterBatch) -> list[float]:
    """(L,) NMI between prompts and patch tokens in each block, mean over images and heads.

    Args:
        tokens: (B, prefix + N, D) from `embed`.
        adapter: one with prompts; 0 stands for blocks before they enter.
    """
    prefix, body = model.num_prefix_tokens, tokens.shape[1]

    def measure(weights: Tensor) -> float:
        # In float32 a sharp prompt may have no attention left for patches: then it looks at them alike.
        attention = weights[:, :, body:, prefix:body].double() + torch.finfo(torch.float64).tiny
        if attention.shape[2] == 0:
            return 0.0
        return normalized_mutual_information(attention / attention.sum(dim=-1, keepdim=True)).mean().item()

    return by_block(model, tokens, adapter, measure)


def nmi_probe(backbone: Backbone, module: AdapterModule, view: View) -> Callable[[], list[float]]:
    """A function that measures ``module`` in eval mode, always on the same `IMAGES` images of ``view``."""
    count = min(IMAGES, len(view))
    (images, _), *_ = view.batches([[index * len(view) // count for index in range(count)]], workers=0)
    with torch.no_grad():
        tokens = embed_pixels(backbone, images, view.preprocess)

    def measure() -> list[float]:
        module.eval()
        return [round(value, 6) for value in prompt_nmi(backbone.model, tokens, module.batch(count))]

    return measure


def recorded_nmi(adapter: Adapter) -> Tensor:
    """The NMI by epoch and block that `train --nmi` has stored with an adapter, (epochs, L).

    Raises:
        UsageError: it holds none.
    """
    try:
        nmi = torch.tensor(adapter.training["nmi"], dtype=torch.float64)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):  # the record of a stranger can be anything
        nmi = torch.zeros(0)
    if nmi.ndim != 2 or nmi.numel() == 0:
        prompts = "" if adapter.prompts else "; it has no prompts, so choose another method"
        raise UsageError(f"--nmi: {adapter.task} was trained without: train with --nmi{prompts}")
    return nmi


def plot_nmi(nmi: Tensor, title: str, path: Path) -> None:
    """Write the curves (epochs, L), a line for each block, as a PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs, depth = nmi.shape
    colours = colormaps["viridis"].resampled(depth)
    for index in range(depth):
        axes.plot(range(1, epochs + 1), nmi[:, index].numpy(), color=colours(index), marker=".", label=str(index + 1))
    axes.set(title=title, xlabel="epoch", ylabel="NMI of prompts and patch tokens")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(title="block", loc="outside right center", fontsize=8)
    save_figure(figure, path, dpi=130)
