"""Adapters on disk: refusals, crashes, races, and what is read again."""

import errno
import gc
import hashlib
import os
import re
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt_serve.adapters import folder as folder_module
from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import FILE_NAME, AdapterStore, BrokenAdapter, TaskSummary
from gpt_serve.errors import AdapterError, BackboneMismatch, InvalidAdapter, InvalidTaskName, UnknownTask, UsageError
from tests.factories import TINY_SPEC, make_adapter, remove_adapter
from tests.hostile_adapters import hostile_adapters, with_metadata

HOSTILE = hostile_adapters(TINY_SPEC)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters", TINY_SPEC)


def file_of(store: AdapterStore, task: str) -> Path:
    return store.root / task / FILE_NAME


def put(store: AdapterStore, task: str, data: bytes) -> Path:
    path = file_of(store, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def files_below(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks whose files were read."""
    seen: list[str] = []
    read = folder_module._read

    def counted(path: Path):
        seen.append(path.parent.name)
        return read(path)

    monkeypatch.setattr(folder_module, "_read", counted)
    return seen


# publish and load


def test_what_is_published_is_loaded(store):
    adapter = make_adapter(task="birds")
    revision = store.publish(adapter)
    data = file_of(store, "birds").read_bytes()
    stored = store.load("birds")
    assert stored.revision == revision == hashlib.sha256(data).hexdigest()[:12]
    assert stored.nbytes == len(data)
    assert stored.signature == store.signature("birds")
    assert torch.equal(stored.adapter.head_weight, adapter.head_weight)
    assert files_below(store.root) == [f"birds/{FILE_NAME}"]


def test_the_signature_changes_with_every_publication(store):
    signatures = []
    for seed in range(10):
        store.publish(make_adapter(seed=seed % 2))
        signatures.append(store.signature("alpha"))
    assert len(set(signatures)) == 10
    assert store.signature("alpha") == signatures[-1]


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "A", "a/b", "a\0b", "x" * 65, ".hidden"])
def test_names_are_checked_before_the_disk_is_touched(store, monkeypatch, name):
    def refuse(*args, **kwargs):
        raise AssertionError("the disk was touched")

    for function in ("open", "stat", "mkdir"):
        monkeypatch.setattr(os, function, refuse)
    for use in (store.load, store.signature, store.summary):
        with pytest.raises(InvalidTaskName):
            use(name)
    with pytest.raises(InvalidTaskName):
        store.publish(make_adapter(task=name))


def test_unknown_task(store):
    store.publish(make_adapter())
    (store.root / "folder").mkdir()
    (store.root / "file").touch()
    for name in ("nothing", "folder", "file"):
        for use in (store.load, store.signature, store.summary):
            with pytest.raises(UnknownTask, match=f"^unknown task '{name}': train it") as caught:
                use(name)
            assert str(store.root) not in str(caught.value)


def test_the_spec_of_a_load_replaces_the_stores(store):
    store.publish(make_adapter())
    other = replace(TINY_SPEC, fingerprint="cd" * 32)
    with pytest.raises(BackboneMismatch):
        store.load("alpha", other)
    assert AdapterStore(store.root).load("alpha").adapter.task == "alpha"
    with pytest.raises(BackboneMismatch):
        AdapterStore(store.root, other).load("alpha")


def test_a_foreign_adapter_is_not_published(store):
    with pytest.raises(BackboneMismatch):
        store.publish(make_adapter(replace(TINY_SPEC, fingerprint="cd" * 32)))
    assert store.tasks() == []


def test_an_invalid_adapter_is_not_published(store):
    store.publish(make_adapter())
    revision = store.load("alpha").revision
    with pytest.raises(InvalidAdapter, match="labels must all be different"):
        store.publish(make_adapter(labels=["a", "a"]))
    assert store.load("alpha").revision == revision


def test_a_folder_of_symlinks_is_followed(store, tmp_path):
    """As container platforms mount them."""
    AdapterStore(tmp_path / "real").publish(make_adapter())
    store.root.mkdir()
    (store.root / "alpha").symlink_to(tmp_path / "real" / "alpha")
    assert store.tasks() == ["alpha"]
    assert store.load("alpha").adapter.task == "alpha"


# hostile files


def open_below(folder: Path) -> list[str]:
    """What this process holds open below a folder; other tests' servers open and close what is theirs."""
    links = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    return [link for link in links if link.startswith(os.path.realpath(folder))]


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.name)
def test_a_hostile_file_is_refused_with_its_reason(store, case):
    case.put(store.root)
    with pytest.raises(AdapterError, match=case.message) as caught:
        store.load(case.name)
    message = str(caught.value)
    assert type(caught.value) is case.error
    assert message.startswith(f"adapter '{case.name}' is refused: ")
    assert message.isprintable() and len(message) < 300 and str(store.root) not in message
    assert not open_below(store.root)


def test_a_file_over_the_limit_is_refused_before_it_is_read(store, monkeypatch):
    def refuse(data):
        raise AssertionError(f"{len(data)} bytes were read")

    monkeypatch.setattr(Adapter, "from_bytes", refuse)
    next(case for case in HOSTILE if case.name == "too-many-bytes").put(store.root)
    with pytest.raises(InvalidAdapter, match="more than the 268435456 allowed"):
        store.load("too-many-bytes")


def test_hostile_files_do_not_disturb_the_others(store):
    for case in HOSTILE:
        case.put(store.root)
    for name in ("aaa", "mmm", "zzz"):
        store.publish(make_adapter(task=name))
    described = store.describe()
    good = [item.task for item in described if isinstance(item, TaskSummary)]
    broken = {item.task: str(item.error) for item in described if isinstance(item, BrokenAdapter)}
    assert good == ["aaa", "mmm", "zzz"]
    # A loop of symlinks cannot even be looked at, but it is there and has its reason.
    assert set(broken) == {case.name for case in HOSTILE}
    assert all(re.search(case.message, broken[case.name]) for case in HOSTILE)
    assert all(store.load(name).adapter.task == name for name in good)


def test_there_are_many_kinds_of_hostile_files(store):
    reasons = set()
    for case in HOSTILE:
        case.put(store.root)
        with pytest.raises(AdapterError) as caught:
            store.load(case.name)
        reasons.add(str(caught.value).removeprefix(f"adapter '{case.name}' is refused: "))
    assert len(reasons) >= 70


def test_a_file_that_changes_while_it_is_read_is_refused(store, monkeypatch):
    store.publish(make_adapter())
    path, fstat, calls = file_of(store, "alpha"), os.fstat, []

    def write_meanwhile(descriptor):
        status = fstat(descriptor)
        if not calls:
            calls.append(path.write_bytes(make_adapter(seed=1).to_bytes()))
            os.utime(path, ns=(0, 0))
        return status

    monkeypatch.setattr(os, "fstat", write_meanwhile)
    with pytest.raises(InvalidAdapter, match="changed while it was read"):
        store.load("alpha")
    assert store.load("alpha").adapter.task == "alpha"


def test_a_file_that_cannot_be_read_is_listed_with_its_reason(store, monkeypatch):
    store.publish(make_adapter())

    def deny(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", "/secret/path")

    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(
        InvalidAdapter, match="^adapter 'alpha' is refused: the file cannot be read: Permission denied$"
    ):
        store.load("alpha")
    monkeypatch.setattr(os, "stat", deny)
    assert [item.to_dict()["error"] for item in store.describe()] == [
        "adapter 'alpha' is refused: the file cannot be read: Permission denied"
    ]


# listing


def test_tasks_are_the_folders_with_an_adapter_file(store):
    for name in ("b", "a.1", "a"):
        store.publish(make_adapter(task=name))
    put(store, "UPPER", b"")
    put(store, ".hidden", b"")
    (store.root / "empty").mkdir()
    (store.root / "file").touch()
    put(store, "stale", b"").rename(store.root / "stale" / f".{FILE_NAME}.0123456789ab.tmp")
    assert store.tasks() == ["a", "a.1", "b"]


def test_a_missing_or_empty_folder_has_no_tasks(store):
    assert store.tasks() == store.describe() == []
    store.root.mkdir()
    assert store.tasks() == store.describe() == []


def test_a_file_in_place_of_the_folder_is_the_users_mistake(store):
    store.root.touch()
    with pytest.raises(UsageError, match=f"the adapter folder {store.root} cannot be read: Not a directory"):
        store.tasks()


def test_summary(store):
    revision = store.publish(make_adapter(task="birds", prompts=7, labels=["owl", "jay"]))
    assert store.summary("birds") == TaskSummary(
        task="birds",
        kind="classification",
        method="gated",
        backbone="tiny",
        labels=("owl", "jay"),
        prompts=7,
        nbytes=file_of(store, "birds").stat().st_size,
        revision=revision,
        val_accuracy=0.75,
        val_miou=None,
        created="2026-01-02T03:04:05Z",
    )
    assert store.summary("birds").classes == store.summary("birds").to_dict()["classes"] == 2


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"val_accuracy": 1}, 1.0),
        ({"val_accuracy": 0.0}, 0.0),
        ({"val_accuracy": 10**400}, None),
        ({"val_accuracy": -0.1}, None),
        ({"val_accuracy": True}, None),
        ({"val_accuracy": "0.9"}, None),
        ({}, None),
        ([], None),
    ],
)
def test_an_accuracy_is_a_share_or_nothing(store, metrics, expected):
    store.publish(make_adapter(training={"metrics": metrics}))
    assert store.summary("alpha").val_accuracy == expected


def test_a_broken_adapter_is_described_and_its_summary_raises(store):
    put(store, "bad", b"nonsense")
    (broken,) = store.describe()
    assert broken.to_dict() == {"task": "bad", "error": str(broken.error)}
    with pytest.raises(InvalidAdapter, match="adapter 'bad' is refused: not a safetensors file"):
        store.summary("bad")


def test_unchanged_files_are_not_read_again(store, reads):
    for number in range(20):
        store.publish(make_adapter(task=f"task-{number}"))
    put(store, "bad", b"nonsense")
    first = store.describe()
    assert len(reads) == 21
    assert store.describe() == first
    assert [store.summary(f"task-{number}") for number in range(20)] == [
        item for number in range(20) for item in first if item.task == f"task-{number}"
    ]
    with pytest.raises(InvalidAdapter):
        store.summary("bad")
    assert len(reads) == 21


def test_changed_and_new_files_are_read_once(store, reads):
    for name in ("a", "b"):
        store.publish(make_adapter(task=name))
    store.describe()
    reads.clear()
    revisions = {name: store.publish(make_adapter(task=name, seed=1)) for name in ("b", "c")}
    described = {item.task: item.revision for item in store.describe()}
    store.describe()
    assert reads == ["b", "c"]
    assert {name: described[name] for name in revisions} == revisions


def test_a_repaired_file_is_served_again(store):
    put(store, "alpha", b"nonsense")
    with pytest.raises(InvalidAdapter):
        store.summary("alpha")
    revision = store.publish(make_adapter())
    assert store.summary("alpha").revision == revision


def test_removed_tasks_are_forgotten(store):
    for number in range(5):
        store.publish(make_adapter(task=f"task-{number}"))
        store.summary(f"task-{number}")
    for number in range(4):
        remove_adapter(store, f"task-{number}")
    assert store.tasks() == ["task-4"]
    assert set(store._described) == {"task-4"}


def test_describe_survives_a_task_that_vanishes(store, monkeypatch):
    store.publish(make_adapter())
    monkeypatch.setattr(store, "tasks", lambda: ["alpha", "vanished"])
    assert [item.task for item in store.describe()] == ["alpha"]


def test_trouble_of_the_disk_is_described_but_not_remembered(store, monkeypatch):
    """Nothing in the file's signature would tell when it is over."""
    store.publish(make_adapter(task="alpha"))

    def fail(path: Path):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "_read", fail)
        (described,) = store.describe()
        assert "Too many open files" in str(described.error)
    assert isinstance(store.summary("alpha"), TaskSummary)


def test_a_remembered_refusal_does_not_keep_the_file_or_grow(store):
    put(store, "bad", b"\xff" * 8 + bytes(8 * 2**20))
    tracemalloc.start()
    try:
        (broken,) = store.describe()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 2**20
    finally:
        tracemalloc.stop()
    for _ in range(3):
        with pytest.raises(InvalidAdapter) as caught:
            store.summary("bad")
    assert str(caught.value) == str(broken.error)
    assert [entry.name for entry in caught.traceback].count("summary") == 1


def test_threads_that_meet_a_remembered_refusal_share_no_exception(store):
    """Raising writes to an exception: one for all would carry the traceback of whichever thread came last."""
    put(store, "bad", b"nonsense")
    (broken,) = store.describe()
    caught: list[AdapterError] = []

    def ask() -> None:
        try:
            store.summary("bad")
        except AdapterError as error:
            caught.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(error) for error in [*caught, broken.error]}) == 9
    assert broken.error.__traceback__ is None


# crashes


def break_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full after half of the file."""

    def write(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_module, "_write_synced", write)


def break_function(name: str):
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, name, fail)

    return apply


CRASHES = {"write": break_open, "fsync": break_function("fsync"), "replace": break_function("replace")}


@pytest.mark.parametrize("crash", CRASHES)
def test_a_failed_publication_leaves_the_old_adapter(store, crash):
    revision = store.publish(make_adapter())
    with pytest.MonkeyPatch.context() as patch:
        CRASHES[crash](patch)
        with pytest.raises(
            UsageError, match=r"adapter 'alpha' cannot be written to .*alpha: (No space|Input)"
        ) as caught:
            store.publish(make_adapter(seed=1))
    assert str(caught.value).isprintable()
    assert store.load("alpha").revision == revision
    assert files_below(store.root) == [f"alpha/{FILE_NAME}"]


@pytest.mark.parametrize("crash", CRASHES)
def test_a_failed_first_publication_leaves_no_task(store, crash):
    with pytest.MonkeyPatch.context() as patch:
        CRASHES[crash](patch)
        with pytest.raises(UsageError):
            store.publish(make_adapter())
    assert store.tasks() == []
    assert files_below(store.root) == []


def test_an_interrupted_publication_leaves_no_temporary_file(store):
    revision = store.publish(make_adapter())

    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.publish(make_adapter(seed=1))
    assert store.load("alpha").revision == revision
    assert files_below(store.root) == [f"alpha/{FILE_NAME}"]


def test_file_and_folder_are_synced_in_that_order(store, monkeypatch):
    store.root.mkdir()
    events = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("replace"), rename(old, new)))
    store.publish(make_adapter())
    assert events[0].name.endswith(".tmp")
    assert events[1:] == ["replace", store.root / "alpha", store.root]


def test_a_folder_that_cannot_be_written_to_is_the_users_mistake(store):
    store.root.touch()
    with pytest.raises(UsageError, match="adapter 'alpha' cannot be written to"):
        store.publish(make_adapter())


# threads


def test_readers_never_see_a_torn_file(store):
    versions = [make_adapter(seed=seed, labels=[f"v{seed}-{index}" for index in range(4)]) for seed in range(2)]
    contents = {hashlib.sha256(adapter.to_bytes()).hexdigest()[:12]: adapter for adapter in versions}
    store.publish(versions[0])
    done = threading.Event()
    problems: list[object] = []
    seen: list[set[str]] = [set(), set(), set()]

    def matches(adapter: Adapter, revision: str) -> bool:
        expected = contents[revision]
        return adapter.labels == expected.labels and torch.equal(adapter.head_weight, expected.head_weight)

    def read(revisions: set[str]) -> None:
        try:
            while not done.is_set():
                stored = store.load("alpha")
                summary = store.summary("alpha")
                (described,) = store.describe()
                assert matches(stored.adapter, stored.revision)
                assert summary.labels == contents[summary.revision].labels
                assert described.labels == contents[described.revision].labels
                revisions.add(stored.revision)
        except Exception as error:
            problems.append(error)

    readers = [threading.Thread(target=read, args=(revisions,)) for revisions in seen]
    for reader in readers:
        reader.start()
    for number in range(60):
        store.publish(versions[number % 2])
    done.set()
    for reader in readers:
        reader.join()
    assert problems == []
    assert set.union(*seen) == set(contents)
    assert store.summary("alpha").revision == store.load("alpha").revision


def test_publishers_do_not_disturb_each_other(store):
    adapters = [make_adapter(seed=seed) for seed in range(8)]
    revisions: list[str] = []
    threads = [threading.Thread(target=lambda item=item: revisions.append(store.publish(item))) for item in adapters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(revisions)) == 8
    assert store.load("alpha").revision in revisions
    assert files_below(store.root) == [f"alpha/{FILE_NAME}"]


def test_a_file_of_another_task_is_refused_by_name(store):
    put(store, "alpha", make_adapter(task="beta").to_bytes())
    with pytest.raises(InvalidAdapter, match="adapter 'alpha' is refused: the file belongs to task 'beta'"):
        store.load("alpha")
    put(store, "alpha", with_metadata(make_adapter(), backbone="renamed"))
    assert store.load("alpha").adapter.backbone == "renamed"


def test_a_file_of_equal_size_times_and_inode_is_another_version(tmp_path: Path) -> None:
    """As ``cp -p`` and reproducible archives make them, in place or where the old inode is used again."""
    store = AdapterStore(tmp_path)
    store.publish(make_adapter(TINY_SPEC, "alpha", seed=0))
    path = tmp_path / "alpha" / FILE_NAME
    before, status = store.signature("alpha"), path.stat()
    other = AdapterStore(tmp_path / "other")
    other.publish(make_adapter(TINY_SPEC, "alpha", seed=1))
    data = (tmp_path / "other" / "alpha" / FILE_NAME).read_bytes()
    assert len(data) == status.st_size and data != path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ino) == (status.st_mtime_ns, status.st_ino)
    assert store.signature("alpha") != before
