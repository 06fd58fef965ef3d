"""Windows, stitching and masks, against plain loops and torch's own interpolation."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gpt_serve.images import masks
from gpt_serve.images.masks import MOST_WINDOWS, Tiling, mask, shares, stitched, tiling
from gpt_serve.images.preprocess import cut_windows, plan_windows
from gpt_serve.specs import Preprocess

GRID, PATCH = (9, 9), (14, 14)
SIZES = [(180, 240), (240, 180), (126, 126), (1, 1), (37, 1000), (3000, 2000), (1, 50_000), (500, 126)]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize(("size", "crop_pct"), list(product(SIZES, [1.0, 0.7, 0.05])))
def test_windows_cover_the_whole_image(size: tuple[int, int], crop_pct: float) -> None:
    plan = tiling(size, GRID, PATCH, "windows", crop_pct)
    seen = np.zeros(plan.patches, int)
    for top, left in plan.windows:
        assert 0 <= top <= max(0, plan.patches[0] - 9) and 0 <= left <= max(0, plan.patches[1] - 9)
        seen[top : top + 9, left : left + 9] += 1
    assert seen.min() >= 1 and 1 <= len(plan.windows) <= MOST_WINDOWS


def test_windows_of_a_photo_keep_its_aspect_ratio() -> None:
    plan = tiling((180, 240), GRID, PATCH, "windows", 0.7)
    assert plan.patches == (13, 17)  # 180 and 240 pixels, in patches of 14
    assert plan.windows == tuple(product((0, 4), (0, 6, 8))), "steps of two thirds, the last shifted back inside"


def test_windows_are_counted_as_they_are_placed() -> None:
    for patches, side in product(range(1, 60), (1, 2, 3, 9)):
        assert masks._count(patches, side) == len(masks._starts(patches, side))


@pytest.mark.parametrize("size", SIZES)
def test_a_single_input_holds_the_whole_image(size: tuple[int, int]) -> None:
    squashed, padded = (tiling(size, GRID, PATCH, mode, 0.5) for mode in ("squash", "pad"))
    assert squashed.patches == GRID and max(padded.patches) == 9
    assert squashed.windows == padded.windows == ((0, 0),)
    shorter = max(1, round(9 * min(size) / max(size)))
    assert min(padded.patches) == shorter


@pytest.mark.parametrize("mode", ["squash", "pad", "windows"])
def test_windows_are_parts_of_the_scaled_image(mode) -> None:
    preprocess = Preprocess((28, 28), 0.5, mode, "bilinear", (0.5,) * 3, (0.5,) * 3)
    image = torch.randint(0, 256, (3, 41, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plan = plan_windows(image, preprocess, (2, 2))
    windows = cut_windows(image, preprocess, plan)
    height, width = (14 * side for side in plan.patches)
    scaled = F.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)[0]
    for window, (top, left) in zip(windows, plan.windows, strict=True):
        expected = torch.zeros(3, 28, 28)
        part = scaled[:, 14 * top : 14 * top + 28, 14 * left : 14 * left + 28]
        expected[:, : part.shape[1], : part.shape[2]] = part
        assert window.shape == (3, 28, 28) and (window - expected).abs().max() <= 1


def plain_stitching(plan: Tiling, logits: np.ndarray, scale: int) -> np.ndarray:
    """A plain loop over cells: the mean of the logits of all windows that a cell lies in."""
    rows, columns = (scale * side for side in plan.patches)
    result = np.empty((logits.shape[1], rows, columns))
    for y, x in product(range(rows), range(columns)):
        found = []
        for window, (top, left) in zip(logits, plan.windows, strict=True):
            within = y - scale * top, x - scale * left
            if 0 <= within[0] < window.shape[1] and 0 <= within[1] < window.shape[2]:
                found.append(window[:, within[0], within[1]].astype(float))
        result[:, y, x] = sum(found) / len(found)
    return result


@pytest.mark.parametrize(("mode", "scale"), list(product(["squash", "pad", "windows"], [1, 8])))
def test_overlapping_logits_are_averaged(mode: str, scale: int) -> None:
    plan = tiling((40, 55), (3, 3), (4, 4), mode, 0.6)
    logits = noise(len(plan.windows), 2, 3 * scale, 3 * scale)
    np.testing.assert_allclose(stitched(plan, logits), plain_stitching(plan, logits, scale), atol=1e-6)


@pytest.mark.parametrize("size", [(180, 240), (5, 3), (1, 1), (301, 1999)])
def test_a_mask_is_the_largest_of_torchs_interpolation(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = noise(5, 9, 13)
    scaled = F.interpolate(torch.from_numpy(logits)[None], size, mode="bilinear", align_corners=False)[0]
    whole = mask(logits, size)
    assert whole.dtype == np.uint8 and whole.shape == size
    first, second = scaled.topk(2, dim=0).values
    sure = (first - second > 1e-5).numpy()
    assert sure.mean() > 0.999 and (whole == scaled.argmax(0).numpy())[sure].all()
    monkeypatch.setattr("gpt_serve.images.masks._BAND", 4000)
    assert (mask(logits, size) == whole).all(), "the bands show"


def test_of_equal_logits_the_lower_id_counts() -> None:
    assert (mask(np.zeros((3, 2, 2), np.float32), (4, 4)) == 0).all()


def test_shares_count_pixels() -> None:
    ids = np.array([[0, 2], [2, 2]], np.uint8)
    assert shares(ids, 4).tolist() == [0.25, 0, 0.75, 0]
