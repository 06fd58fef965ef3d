from pathlib import Path

import pytest

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.setting import PHOTO_SIZE, photo, untrained_adapter
from gpt_serve.images.decode import decode
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.methods.prompts import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_valid_and_have_what_their_method_learns(method: str, tiny: Backbone, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, tiny.spec)
    store.publish(untrained_adapter(tiny, "some", method, 7))
    adapter, kind = store.load("some").adapter, METHODS[method]
    assert adapter.prompts == (7 if kind.prompts else 0)
    assert adapter.deep is kind.deep
    assert (adapter.gamma is not None, adapter.tau is not None) == (kind.gated, kind.tempered)


def test_photos_are_alike_in_size_and_different_in_content() -> None:
    files = [photo(seed) for seed in range(3)]
    assert photo(0) == files[0]
    assert len(set(files)) == 3
    for file in files:
        image = decode(file)
        assert tuple(image.shape) == (3, PHOTO_SIZE[1], PHOTO_SIZE[0])
        assert image.float().std() > 20
        assert 20_000 < len(file) < 120_000  # as camera JPEGs of this size
