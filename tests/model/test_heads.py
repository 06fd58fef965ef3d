"""Heads against plain modules."""

import torch

from gpt_serve.adapters.unknown import known_share
from gpt_serve.model.heads import HeadForm, mask_logits, per_patch, stranger_distance
from tests.factories import CHANNELS, TINY_SPEC, make_adapter, make_segmenter, make_unknown
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


def test_a_distance_is_mahalanobis_of_the_covariance_that_basis_and_scale_stand_for() -> None:
    unknown = make_unknown(16)
    inverse = torch.diag(unknown.scale.square()) - unknown.basis.T @ unknown.basis
    features = 3 * tokens()[0]
    offset = (features - unknown.mean).double()
    expected = torch.einsum("bi,ij,bj->b", offset, inverse.double(), offset)
    actual = stranger_distance(features, unknown.mean, unknown.scale, unknown.basis)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-3)


def test_the_share_of_images_as_far_out_counts_knots() -> None:
    knots = torch.tensor([1.0, 2.0, 3.0, 4.0])
    distances = torch.tensor([0.5, 1.0, 2.5, 4.5, float("nan"), float("inf")])
    assert known_share(knots, distances).tolist() == [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
