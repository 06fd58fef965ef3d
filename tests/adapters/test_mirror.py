"""A store elsewhere: what is listed, fetched, verified and kept, and what happens while it is gone."""

import hashlib
import re
import threading
import time
from pathlib import Path

import pytest

from gpt_serve.adapters import bucket as bucket_module
from gpt_serve.adapters.bucket import DIGEST_NAME, SCHEMES, Bucket, Scheme
from gpt_serve.adapters.mirror import Mirror
from gpt_serve.adapters.store import FILE_NAME, AdapterStore
from gpt_serve.errors import BackboneMismatch, InvalidAdapter, UnknownTask, UsageError
from tests.factories import TINY_SPEC, make_adapter
from tests.s3 import S3

ADDRESS = "s3://models/team"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bucket_module, "PUSH_SECONDS", 0.01)
    return tmp_path / "cache" / "gpt-serve" / "adapters"


def put(s3: S3, task: str, data: bytes, digest: bytes | None = None) -> None:
    s3.client.put_object(Bucket="models", Key=f"team/{task}/{FILE_NAME}", Body=data)
    if digest is not None:
        s3.client.put_object(Bucket="models", Key=f"team/{task}/{DIGEST_NAME}", Body=digest)


def publish(s3: S3, task: str, seed: int = 0) -> str:
    """As ``push`` does; the revision."""
    data = make_adapter(task=task, seed=seed).to_bytes()
    put(s3, task, data, f"{hashlib.sha256(data).hexdigest()}  {FILE_NAME}\n".encode())
    return hashlib.sha256(data).hexdigest()[:12]


def mirror_of(store: AdapterStore) -> Mirror:
    assert isinstance(store.source, Mirror)
    return store.source


def until_revision(store: AdapterStore, task: str, revision: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while store.load(task).revision != revision:
        store.signature(task)  # as each request does
        assert time.monotonic() < end, mirror_of(store)._failing
        time.sleep(0.02)


def test_a_bucket_is_a_store(s3: S3) -> None:
    revisions = {task: publish(s3, task) for task in ("birds", "cars")}
    s3.client.put_object(Bucket="models", Key="team/birds/README.md", Body=b"a card")
    s3.client.put_object(Bucket="models", Key="team/Not A Task/adapter.safetensors", Body=b"x")
    s3.client.put_object(Bucket="models", Key="team/adapter.safetensors", Body=b"x")
    s3.client.put_object(Bucket="models", Key="team/too/deep/adapter.safetensors", Body=b"x")
    store = AdapterStore(ADDRESS, TINY_SPEC)
    assert store.tasks() == ["birds", "cars"]
    assert {item.task: item.revision for item in store.describe()} == revisions
    assert store.load("birds").revision == revisions["birds"]
    with pytest.raises(UnknownTask):
        store.signature("nobody")


def test_what_is_published_there_is_loaded_elsewhere(s3: S3) -> None:
    revision = AdapterStore(ADDRESS, TINY_SPEC).publish(make_adapter(task="birds"))
    assert AdapterStore(ADDRESS, TINY_SPEC).load("birds").revision == revision


def test_requests_cost_no_call_and_files_are_fetched_once(s3: S3) -> None:
    publish(s3, "birds")
    store = AdapterStore(ADDRESS)
    assert s3.listings == 1
    s3.calls.clear()
    for _ in range(100):
        store.signature("birds")
        store.load("birds")
        store.summary("birds")
    assert s3.count("GET", FILE_NAME) == 2  # with the digest
    assert len(s3.calls) == 2
    AdapterStore(ADDRESS).load("birds")  # another process of this machine
    assert s3.count("GET", f"birds/{FILE_NAME}") == 2


def test_listings_are_bounded_however_many_ask(s3: S3) -> None:
    """Three stores as in three processes of a machine, polling for two seconds every half: five listings, not 12."""
    publish(s3, "birds")
    stores = [AdapterStore(ADDRESS, poll_seconds=0.5) for _ in range(3)]
    s3.calls.clear()
    for store in stores:
        store.signature("birds")
    began = time.monotonic()
    time.sleep(2)
    for store in stores:
        mirror_of(store).close()
    intervals = (time.monotonic() - began) / 0.5
    assert 1 <= s3.listings <= intervals + 1


def test_replaced_new_and_removed_adapters_are_seen_within_the_interval(s3: S3) -> None:
    publish(s3, "birds"), publish(s3, "cars")
    store = AdapterStore(ADDRESS, poll_seconds=0.2)
    store.load("birds")
    revision = publish(s3, "birds", seed=1)
    until_revision(store, "birds", revision, 10)
    publish(s3, "dogs")
    s3.client.delete_object(Bucket="models", Key=f"team/cars/{FILE_NAME}")
    end = time.monotonic() + 10
    while store.tasks() != ["birds", "dogs"]:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_digest_that_differs_is_refused(s3: S3) -> None:
    put(s3, "birds", make_adapter(task="birds").to_bytes(), b"0" * 64)
    with pytest.raises(InvalidAdapter, match="digest .*, its publisher wrote 000000000000: push it again"):
        AdapterStore(ADDRESS).load("birds")


def test_a_task_in_use_goes_on_while_its_new_version_is_not_what_was_pushed(s3: S3, caplog) -> None:
    old = publish(s3, "birds")
    store = AdapterStore(ADDRESS, poll_seconds=0.1)
    assert store.load("birds").revision == old
    put(s3, "birds", make_adapter(task="birds", seed=1).to_bytes())  # the digest is still the old one's
    mirror = mirror_of(store)
    time.sleep(0.2)
    mirror.refresh()
    assert store.load("birds").revision == old
    assert "adapter 'birds' stays as it was: the file has the digest" in caplog.text
    new = publish(s3, "birds", seed=1)
    time.sleep(0.2)
    mirror.refresh()
    assert store.load("birds").revision == new


def test_a_publication_seen_between_its_two_files_is_read_again(s3: S3, monkeypatch) -> None:
    publish(s3, "birds")
    store = AdapterStore(ADDRESS)
    put(s3, "birds", make_adapter(task="birds", seed=1).to_bytes())
    revisions: list[str] = []
    monkeypatch.setattr(bucket_module.time, "sleep", lambda _: revisions.append(publish(s3, "birds", seed=1)))
    assert [store.load("birds").revision] == revisions


def test_answers_go_on_while_the_store_is_gone(s3: S3, caplog, monkeypatch) -> None:
    monkeypatch.setitem(SCHEMES, "s3", Scheme("s3fs", "", {"config_kwargs": {"retries": {"total_max_attempts": 1}}}))
    revision = publish(s3, "birds")
    publish(s3, "cold")
    store = AdapterStore(ADDRESS, poll_seconds=0.1)
    store.load("birds")
    s3.stop()
    try:
        time.sleep(0.2)
        for _ in range(2):
            mirror_of(store).refresh()
        assert caplog.text.count("adapters go on from what is there: s3://models/team cannot be reached") == 1
        assert store.load("birds").revision == revision
        with pytest.raises(InvalidAdapter, match="'cold' is refused: the file cannot be read: its store") as caught:
            store.load("cold")
        assert "s3://" not in str(caught.value), "clients are told no address"
        assert "adapter 'cold' cannot be fetched: s3://models/team cannot be reached" in caplog.text
        again = AdapterStore(ADDRESS)  # a server that starts meanwhile
        assert again.tasks() == ["birds", "cold"] and again.load("birds").revision == revision
    finally:
        s3.start()
    new = publish(s3, "birds", seed=1)
    until_revision(store, "birds", new, 30)
    assert store.load("cold").adapter.task == "cold"


def test_no_bucket(s3: S3) -> None:
    with pytest.raises(
        UsageError, match="^the adapter store cannot be listed: there is no s3://nothing-here/x"
    ) as caught:
        AdapterStore("s3://nothing-here/x")
    assert len(str(caught.value).splitlines()) == 1


def test_no_rights(s3: S3) -> None:
    publish(s3, "birds")
    s3.refuse(True)
    try:
        with pytest.raises(UsageError, match="s3://models/team refuses these credentials: .*Access Key"):
            AdapterStore(ADDRESS)
    finally:
        s3.refuse(False)


def test_no_credentials(s3: S3, monkeypatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="cannot be reached: Unable to locate credentials"):
        AdapterStore(ADDRESS)


def test_an_adapter_for_another_backbone_is_refused(s3: S3) -> None:
    data = make_adapter(task="birds", backbone_sha256="cd" * 32).to_bytes()
    put(s3, "birds", data)
    with pytest.raises(BackboneMismatch):
        AdapterStore(ADDRESS, TINY_SPEC).load("birds")


def test_without_a_digest_the_size_is_checked(s3: S3, caplog) -> None:
    put(s3, "birds", make_adapter(task="birds").to_bytes())
    store = AdapterStore(ADDRESS)
    put(s3, "birds", make_adapter(task="birds", prompts=9).to_bytes())
    with pytest.raises(InvalidAdapter, match="does not give it now"):
        store.load("birds")
    assert "it was replaced since it was listed" in caplog.text
    assert AdapterStore(ADDRESS).load("birds").adapter.prompts == 9


def test_a_file_that_is_too_large_is_not_fetched(s3: S3, monkeypatch) -> None:
    publish(s3, "birds")
    store = AdapterStore(ADDRESS)
    s3.calls.clear()
    monkeypatch.setattr(bucket_module, "MAX_FILE_BYTES", 100)
    with pytest.raises(InvalidAdapter, match="more than the 100 allowed"):
        store.load("birds")
    assert s3.calls == []


def test_a_kept_file_that_was_damaged_is_fetched_again(s3: S3, own_cache: Path, caplog) -> None:
    revision = publish(s3, "birds")
    store = AdapterStore(ADDRESS)
    store.load("birds")
    (kept,) = own_cache.glob("*/birds/*.safetensors")
    kept.write_bytes(b"?" + kept.read_bytes()[1:])
    assert store.load("birds").revision == revision
    assert "was damaged on the disk" in caplog.text


def test_a_disk_that_is_full_costs_no_answer(s3: S3, own_cache: Path, monkeypatch, caplog) -> None:
    revision = publish(s3, "birds")
    store = AdapterStore(ADDRESS)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert store.load("birds").revision == revision
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize("address", ["ftp://x/y", "s3://", "hf://owner", "s3:///"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match=f"{re.escape(address)} is no address of adapters"):
        AdapterStore(address)


def test_an_address_that_became_a_path_is_no_empty_folder() -> None:
    with pytest.raises(UsageError, match="s3:/models/team was an address before it became a Path"):
        AdapterStore(Path(ADDRESS))


def test_a_library_that_is_missing_is_named(monkeypatch) -> None:
    monkeypatch.setitem(SCHEMES, "gs", Scheme("no_such_module", "gpt-serve[gs]"))
    with pytest.raises(UsageError, match=re.escape("gs://b/p needs no_such_module: pip install 'gpt-serve[gs]'")):
        Bucket("gs://b/p")


def test_a_shared_file_system(tmp_path: Path) -> None:
    folder = AdapterStore(tmp_path / "shared")
    old = folder.publish(make_adapter(task="birds"))
    store = AdapterStore(f"file://{tmp_path}/shared", poll_seconds=0.1)
    assert store.load("birds").revision == old
    until_revision(store, "birds", folder.publish(make_adapter(task="birds", seed=1)), 10)
    new = store.publish(make_adapter(task="birds", seed=2))
    assert folder.load("birds").revision == store.load("birds").revision == new


def test_a_store_that_nobody_holds_stops_polling(tmp_path: Path) -> None:
    AdapterStore(tmp_path / "shared").publish(make_adapter(task="birds"))
    store = AdapterStore(f"file://{tmp_path}/shared", poll_seconds=0.1)
    store.signature("birds")
    poller = mirror_of(store)._poller
    assert poller is not None and poller.is_alive()
    del store
    poller.join(10)
    assert not poller.is_alive()


def test_readers_meet_one_revision_at_a_time(tmp_path: Path) -> None:
    """Content, revision and signature belong together while the adapter is replaced and readers share the store."""
    folder = AdapterStore(tmp_path / "shared")
    labels = {folder.publish(make_adapter(task="birds", seed=0, labels=["s0", "x"])): "s0"}
    store = AdapterStore(f"file://{tmp_path}/shared", poll_seconds=0.05)
    done, wrong, seen = threading.Event(), [], set()

    def read() -> None:
        while not done.is_set():
            store.signature("birds")
            stored = store.load("birds")
            seen.add(stored.revision)
            if stored.adapter.labels[0] != labels[stored.revision]:
                wrong.append(stored.revision)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for seed in range(1, 6):
        adapter = make_adapter(task="birds", seed=seed, labels=[f"s{seed}", "x"])
        labels[hashlib.sha256(adapter.to_bytes()).hexdigest()[:12]] = f"s{seed}"
        folder.publish(adapter)
        time.sleep(0.3)
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == [] and len(seen) >= 3
