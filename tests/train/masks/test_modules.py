"""What training computes, and what is published of it, against plain modules."""

import torch
from torch import nn
from torch.nn import functional as F

from gpt_serve.model.backbone import Backbone
from gpt_serve.model.heads import mask_logits
from gpt_serve.train.masks.fit import _build
from gpt_serve.train.masks.modules import AUXILIARY_WEIGHT, SetrModule, pixel_loss, setr_taps, spread_taps
from gpt_serve.train.masks.recipe import choose_mask_recipe
from gpt_serve.train.masks.samples import NOTHING
from tests.plain_setr import PlainSetr
from tests.tiny_vit import random_images

CLASSES = 3


def built(tiny: Backbone, **settings: object) -> SetrModule:
    torch.manual_seed(0)
    module = _build(tiny, choose_mask_recipe("masks", head="setr-pup", prompts=2, **settings)[0], CLASSES)
    assert isinstance(module, SetrModule)
    return module


def stirred(module: SetrModule) -> SetrModule:
    """With statistics and weights of BatchNorm as training leaves them."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.running_mean, part.running_var, part.weight.data, part.bias.data):
                tensor.add_(torch.rand(tensor.shape, generator=generator))
    return module


def plain_of(module: SetrModule) -> PlainSetr:
    plain = PlainSetr(24, module.head.in_features, CLASSES, module.grid)
    plain.norm.load_state_dict(module.decoder.norm.state_dict())
    for (convolution, norm), own, own_norm in zip(
        plain.convolutions(), module.decoder.convolutions, module.decoder.norms, strict=True
    ):
        convolution.load_state_dict(own.state_dict())
        norm.load_state_dict(own_norm.state_dict())
    plain.classifier.load_state_dict({"weight": module.head.weight[..., None, None], "bias": module.head.bias})
    return plain


def test_the_decoder_in_training_is_a_plain_setr_pup(tiny: Backbone) -> None:
    module = stirred(built(tiny))
    tokens = torch.randn(2, 16, 24 * len(module.taps), generator=torch.Generator().manual_seed(2))
    for training in (True, False):
        plain = plain_of(module).train(training)
        expected = plain(tokens[..., :24])
        torch.testing.assert_close(module.train(training).answer(tokens), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_is_published_answers_as_what_was_trained(tiny: Backbone) -> None:
    module = stirred(built(tiny)).eval()
    tokens = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(3))
    stored = module.stored()
    tensors = {"head.weight": stored["head_weight"], "head.bias": stored["head_bias"], **stored["decoder"]}
    assert stored["taps"] == module.taps[:1] and stored["kind"] == "segmentation"
    torch.testing.assert_close(mask_logits(tokens, tensors, (4, 4)), module.answer(tokens), rtol=1e-5, atol=1e-5)


def test_auxiliary_heads_count_while_training_only(tiny: Backbone) -> None:
    module = stirred(built(tiny))
    features = torch.randn(2, 16, 24 * len(module.taps), generator=torch.Generator().manual_seed(4))
    ids = torch.randint(0, CLASSES, (2, 16, 16), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    alone, logits = module.eval().loss(features, ids)
    torch.testing.assert_close(alone, pixel_loss(logits, ids))
    together, logits = module.train().loss(features, ids)
    parts = features.split(24, dim=-1)[1:]
    assert len(parts) == len(module.auxiliary) >= 1
    others = sum(pixel_loss(head(part), ids) for head, part in zip(module.auxiliary, parts, strict=True))
    torch.testing.assert_close(together, pixel_loss(logits, ids) + AUXILIARY_WEIGHT * others)


def test_blocks_that_heads_read() -> None:
    assert [tap.block for tap in setr_taps(12)] == [11, 4, 8], "the last, the 5th and the 9th"
    assert [tap.block for tap in setr_taps(24)] == [23, 9, 17]
    assert [tap.block for tap in spread_taps(12)] == [5, 8, 10, 11]
    assert [tap.block for tap in spread_taps(3)] == [0, 1, 2]


def test_the_loss_is_of_pixels_with_a_class() -> None:
    logits = torch.randn(2, CLASSES, 4, 4, generator=torch.Generator().manual_seed(6))
    ids = torch.randint(0, CLASSES, (2, 8, 8), generator=torch.Generator().manual_seed(7)).to(torch.uint8)
    ids[0, :3] = NOTHING
    scaled = F.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    total, count = 0.0, 0
    for picture in range(2):
        for y in range(8):
            for x in range(8):
                if ids[picture, y, x] != NOTHING:
                    total -= scaled[picture, :, y, x].log_softmax(0)[int(ids[picture, y, x])].item()
                    count += 1
    assert abs(pixel_loss(logits, ids).item() - total / count) < 1e-5
    assert pixel_loss(logits, torch.full_like(ids, NOTHING)) == 0


def test_optimizers_know_the_head_from_what_steers(tiny: Backbone) -> None:
    module = built(tiny)
    heads = {id(parameter) for parameter in module.head_parameters()}
    steering = {id(parameter) for parameter in module.steering()}
    assert not heads & steering and len(heads) + len(steering) == len(list(module.parameters()))
    assert id(module.prompt) in steering and id(module.decoder.norm.weight) in heads
    tokens = module.features(tiny.model, random_images(2))
    assert tokens.shape == (2, 16, 24 * len(module.taps))
