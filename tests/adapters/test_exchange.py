"""One adapter and its card, there and back."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from gpt_serve.adapters import bucket as bucket_module
from gpt_serve.adapters.exchange import pull, push
from gpt_serve.adapters.hub import hub_card, hub_name
from gpt_serve.adapters.store import FILE_NAME, AdapterStore
from gpt_serve.errors import InvalidAdapter, UnknownTask, UsageError
from tests.factories import make_adapter
from tests.hub import Hub
from tests.s3 import S3


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bucket_module, "PUSH_SECONDS", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of adapters: birds, with a card and with notes of the user's."""
    AdapterStore(tmp_path / "adapters").publish(make_adapter(task="birds", backbone="vit_base_patch16_224.mae"))
    (tmp_path / "adapters" / "birds" / "README.md").write_text("# birds")
    (tmp_path / "adapters" / "birds" / "notes.txt").write_text("private")
    return tmp_path / "adapters"


def address(kind: str, tmp_path: Path) -> str:
    return "s3://models/team" if kind == "s3" else f"file://{tmp_path}/shared"


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_there_and_back(kind: str, s3: S3, folder: Path, tmp_path: Path) -> None:
    there = address(kind, tmp_path)
    pushed = push(folder, "birds", there + "/")
    assert pushed["files"] == ["README.md", FILE_NAME] and pushed["to"] == there
    pulled = pull(there, "birds", tmp_path / "other")
    assert pulled["revision"] == pushed["revision"] == AdapterStore(folder).load("birds").revision
    assert (tmp_path / "other" / "birds" / FILE_NAME).read_bytes() == (folder / "birds" / FILE_NAME).read_bytes()
    assert (tmp_path / "other" / "birds" / "README.md").read_text() == "# birds"
    assert not (tmp_path / "other" / "birds" / "notes.txt").exists()


def test_the_digest_is_one_that_sha256sum_reads(folder: Path, tmp_path: Path) -> None:
    push(folder, "birds", f"file://{tmp_path}/shared")
    where = tmp_path / "shared" / "birds"
    run = subprocess.run(["sha256sum", "--check", f"{FILE_NAME}.sha256"], cwd=where, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_what_cannot_be_moved(s3: S3, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownTask):
        push(folder, "nobody", "s3://models/team")
    with pytest.raises(UsageError, match="is no address of adapters"):
        push(folder, "birds", "models/team")
    with pytest.raises(UsageError, match="adapter 'birds' cannot be pushed: there is no s3://nothing-here/x"):
        push(folder, "birds", "s3://nothing-here/x")
    push(folder, "birds", "s3://models/team")
    with pytest.raises(UnknownTask, match="there is no task 'dogs' in s3://models/team"):
        pull("s3://models/team", "dogs", tmp_path / "other")
    key = f"team/birds/{FILE_NAME}"
    s3.client.put_object(Bucket="models", Key=key, Body=make_adapter(task="birds", seed=5).to_bytes())
    with pytest.raises(InvalidAdapter, match="its publisher wrote"):
        pull("s3://models/team", "birds", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.shutdown()
    hub.server_close()


def on_the_hub(hub: Hub, program: str, *arguments: str) -> Any:
    """What ``program`` prints as JSON, in a process of its own: the library reads its address when it is imported."""
    program = f"import json, sys\nfrom pathlib import Path\n{program}"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


PUSH_AND_PULL = """
from gpt_serve.adapters.exchange import pull, push
from gpt_serve.adapters.store import AdapterStore
folder, other = map(Path, sys.argv[1:])
pushed = [push(folder, task, "hf://someone/models") for task in ("birds", "cars")]
tasks = AdapterStore("hf://someone/models").tasks()
print(json.dumps([pushed, tasks, pull("hf://someone/models", "birds", other)]))
"""


def test_the_hub(hub: Hub, folder: Path, tmp_path: Path) -> None:
    AdapterStore(folder).publish(make_adapter(task="cars", backbone="vit_base_patch16_224.mae"))
    pushed, tasks, pulled = on_the_hub(hub, PUSH_AND_PULL, str(folder), str(tmp_path / "other"))
    files = ["birds/README.md", f"birds/{FILE_NAME}", f"birds/{FILE_NAME}.sha256"]
    assert sorted(hub.commits[0]) == ["README.md", *files], "one commit, so that nobody sees a part"
    card = ModelCard(hub.repositories["someone/models"]["README.md"].decode())
    assert card.data.to_dict() | {"tags": None} == {
        "library_name": "gpt-serve",
        "pipeline_tag": "image-classification",
        "base_model": "timm/vit_base_patch16_224.mae",
        "base_model_relation": "adapter",
        "tags": None,
    }
    assert "- [birds](birds/README.md)\n- [cars](cars/README.md)" in card.text
    assert tasks == ["birds", "cars"]
    data = (tmp_path / "other" / "birds" / FILE_NAME).read_bytes()
    assert data == (folder / "birds" / FILE_NAME).read_bytes()
    assert pulled["revision"] == pushed[0]["revision"] == hashlib.sha256(data).hexdigest()[:12]


MISSING = """
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import UsageError
try:
    AdapterStore("hf://someone/nothing")
except UsageError as error:
    print(json.dumps(str(error)))
"""


def test_a_repository_that_is_not_there(hub: Hub) -> None:
    message = "there is no hf://someone/nothing, or nothing in it that you may see"
    assert on_the_hub(hub, MISSING) == f"the adapter store cannot be listed: {message}"


def test_the_bundled_backbone_is_on_no_hub() -> None:
    card = hub_card("someone/models", ["birds"], make_adapter(task="birds", backbone="mae-vit-tiny-32"))
    assert hub_name("mae-vit-tiny-32") is None
    assert "base_model" not in card
