"""Heads against plain modules."""

import torch

from gpt_serve.model.heads import HeadForm, mask_logits, per_patch
from tests.factories import CHANNELS, TINY_SPEC, make_adapter, make_segmenter
from tests.plain_setr import PlainSetr

GRID = (3, 5)


def tokens(seed: int = 0, width: int = 16) -> torch.Tensor:
    return torch.randn(2, 15, width, generator=torch.Generator().manual_seed(seed))


def test_a_linear_head_is_a_convolution_of_one_pixel() -> None:
    adapter = make_segmenter(TINY_SPEC)
    plain = torch.nn.Conv2d(16, 4, 1)
    plain.weight.data, plain.bias.data = adapter.head_weight[..., None, None], adapter.head_bias
    image = torch.stack([tokens()[:, index] for index in range(15)], dim=-1).view(2, 16, *GRID)
    actual = per_patch(tokens(), adapter.head_weight, adapter.head_bias, GRID)
    torch.testing.assert_close(actual, plain(image), rtol=0, atol=1e-5)


def test_the_decoder_equals_a_plain_setr_pup() -> None:
    adapter = make_segmenter(TINY_SPEC, decoder=True)
    plain = PlainSetr(16, CHANNELS, 4, GRID).eval()
    plain.norm.weight.data, plain.norm.bias.data = (adapter.decoder[f"head.norm.{part}"] for part in ("weight", "bias"))
    for number, (convolution, norm) in enumerate(plain.convolutions(), start=1):
        own = [adapter.decoder[f"head.conv{number}.{part}"] for part in ("weight", "bias")]
        convolution.weight.data, convolution.bias.data = own
        norm.running_var.fill_(1 - norm.eps)  # nothing but the identity: what training folds is tested there
    plain.classifier.weight.data, plain.classifier.bias.data = adapter.head_weight[..., None, None], adapter.head_bias
    tensors = {"head.weight": adapter.head_weight, "head.bias": adapter.head_bias, **adapter.decoder}
    actual = mask_logits(tokens(), tensors, GRID)
    assert actual.shape == (2, 4, 24, 40)
    torch.testing.assert_close(actual, plain(tokens()), rtol=0, atol=1e-5)


def test_operations_are_those_of_the_convolutions() -> None:
    pooled, linear, decoder = (
        HeadForm.of(adapter) for adapter in (make_adapter(), make_segmenter(), make_segmenter(decoder=True))
    )
    assert not pooled.masks and linear.masks and decoder.masks
    assert (pooled.decodes, linear.decodes, decoder.decodes) == (False, False, True)
    assert pooled.operations(15) == linear.operations(15) == 0
    macs = 15 * 9 * CHANNELS * (16 + CHANNELS * (4 + 16 + 64))
    assert decoder.operations(15) == 2 * macs
