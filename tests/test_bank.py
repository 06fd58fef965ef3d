"""Adapters on the device: what is loaded when, and what leaves."""

import errno
import threading
from pathlib import Path

import pytest
import torch

from gpt_serve import store as store_module
from gpt_serve.adapter import Adapter
from gpt_serve.backbone import Backbone
from gpt_serve.bank import AdapterBank, Resident
from gpt_serve.errors import BackboneMismatch, GPTServeError, InvalidAdapter, InvalidTaskName, UnknownTask, UsageError
from gpt_serve.specs import BackboneSpec
from gpt_serve.store import FILE_NAME, AdapterStore, StoredAdapter
from tests.factories import make_adapter


class CountingStore(AdapterStore):
    """Notes which files are read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.loads: list[str] = []

    def load(self, task: str, spec: BackboneSpec | None = None) -> StoredAdapter:
        self.loads.append(task)
        return super().load(task, spec)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path)


def bank_of(backbone: Backbone, store: AdapterStore, capacity: int = 8) -> AdapterBank:
    return AdapterBank(backbone, store, capacity)


def overwrite(store: AdapterStore, task: str, data: bytes) -> None:
    """Replace a file as a careless script would, but with a rename."""
    path = store.root / task / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "new").write_bytes(data)
    (path.parent / "new").replace(path)


def test_resident_is_the_file(tiny, store):
    adapter = make_adapter(tiny.spec, "alpha", method="gated", prompts=4, classes=6)
    revision = store.publish(adapter)
    resident = bank_of(tiny, store).get("alpha")
    assert (resident.task, resident.revision, resident.labels) == ("alpha", revision, adapter.labels)
    assert resident.preprocess == adapter.preprocess
    assert torch.equal(resident.head_weight, adapter.head_weight)
    assert torch.equal(resident.head_bias, adapter.head_bias)
    assert torch.equal(resident.tensors.prompt[0], adapter.prompt)
    assert torch.equal(resident.tensors.gate[0], adapter.gamma.sigmoid())
    assert torch.equal(resident.tensors.tau[0], adapter.tau)


def test_loaded_once(tiny, store):
    store.publish(make_adapter(tiny.spec, "alpha"))
    bank = bank_of(tiny, store)
    assert bank.get("alpha") is bank.get("alpha")
    assert store.loads == ["alpha"]


def test_least_recently_used_leaves_first(tiny, store):
    for task in ("a", "b", "c"):
        store.publish(make_adapter(tiny.spec, task))
    bank = bank_of(tiny, store, capacity=2)
    for task in ("a", "b", "a", "c", "a"):  # c pushes out b
        bank.get(task)
    assert store.loads == ["a", "b", "c"]
    assert len(bank) == 2
    bank.get("b")  # which pushes out c
    bank.get("a")
    assert store.loads == ["a", "b", "c", "b"]
    bank.get("c")
    assert store.loads == ["a", "b", "c", "b", "c"]
    assert len(bank) == 2


def test_capacity_of_one(tiny, store):
    for task in ("a", "b"):
        store.publish(make_adapter(tiny.spec, task))
    bank = bank_of(tiny, store, capacity=1)
    assert [bank.get(task).task for task in ("a", "b", "b", "a")] == ["a", "b", "b", "a"]
    assert store.loads == ["a", "b", "a"]


def test_what_has_left_still_works_for_those_who_hold_it(tiny, store):
    for task in ("a", "b"):
        store.publish(make_adapter(tiny.spec, task))
    bank = bank_of(tiny, store, capacity=1)
    resident = bank.get("a")
    weight = resident.head_weight.clone()
    bank.get("b")
    assert torch.equal(resident.head_weight, weight)


@pytest.mark.parametrize("capacity", [0, -1])
def test_capacity_must_be_positive(tiny, store, capacity):
    with pytest.raises(UsageError, match=f"a bank of {capacity} adapters .*: use a capacity of 1 or more"):
        bank_of(tiny, store, capacity)


def test_reloaded_when_the_file_changes(tiny, store):
    first = store.publish(make_adapter(tiny.spec, "alpha", seed=1))
    bank = bank_of(tiny, store)
    assert bank.get("alpha").revision == first
    second = store.publish(make_adapter(tiny.spec, "alpha", seed=2))
    assert bank.get("alpha").revision == second != first
    assert bank.get("alpha").revision == second
    assert store.loads == ["alpha", "alpha"]
    assert len(bank) == 1


def test_file_replaced_between_the_look_and_the_reading(tiny, tmp_path):
    class Racing(CountingStore):
        def load(self, task: str, spec: BackboneSpec | None = None) -> StoredAdapter:
            if not self.loads:
                self.publish(make_adapter(tiny.spec, "alpha", seed=2))
            return super().load(task, spec)

    store = Racing(tmp_path)
    store.publish(make_adapter(tiny.spec, "alpha", seed=1))
    bank = bank_of(tiny, store)
    assert bank.get("alpha").revision == AdapterStore(tmp_path).load("alpha").revision
    bank.get("alpha")
    assert store.loads == ["alpha"]


def test_removed_adapter_is_unknown_and_dropped(tiny, store):
    store.publish(make_adapter(tiny.spec, "alpha"))
    bank = bank_of(tiny, store)
    bank.get("alpha")
    store.remove("alpha")
    with pytest.raises(UnknownTask, match="unknown task 'alpha'"):
        bank.get("alpha")
    assert len(bank) == 0


def test_names_that_cannot_exist_cost_nothing(tiny, store):
    bank = bank_of(tiny, store)
    for task, error in [("nobody", UnknownTask), ("../alpha", InvalidTaskName), ("", InvalidTaskName)]:
        with pytest.raises(error):
            bank.get(task)
    assert store.loads == [] and len(bank) == 0


# Refused files


def test_refused_file_is_read_once(tiny, store):
    overwrite(store, "alpha", b"not an adapter at all")
    bank = bank_of(tiny, store)
    messages = set()
    for _ in range(5):
        with pytest.raises(InvalidAdapter) as caught:
            bank.get("alpha")
        messages.add(str(caught.value))
    assert store.loads == ["alpha"]
    assert len(messages) == 1 and "adapter 'alpha' is refused" in messages.pop()


def test_refusal_is_a_new_error_each_time(tiny, store):
    """One object raised again and again, by many threads, would collect all their frames."""
    overwrite(store, "alpha", b"not an adapter at all")
    bank = bank_of(tiny, store)
    errors: list[GPTServeError] = []
    for _ in range(3):
        with pytest.raises(InvalidAdapter) as caught:
            bank.get("alpha")
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 3
    depths = []
    for error in errors:
        depth, entry = 0, error.__traceback__
        while entry is not None:
            depth, entry = depth + 1, entry.tb_next
        depths.append(depth)
    assert depths == [depths[0]] * 3


def test_fixed_file_is_taken(tiny, store):
    overwrite(store, "alpha", b"not an adapter at all")
    bank = bank_of(tiny, store)
    with pytest.raises(InvalidAdapter):
        bank.get("alpha")
    revision = store.publish(make_adapter(tiny.spec, "alpha"))
    assert bank.get("alpha").revision == revision
    overwrite(store, "alpha", b"broken again")
    with pytest.raises(InvalidAdapter):
        bank.get("alpha")
    assert store.loads == ["alpha"] * 3


def test_adapter_of_another_backbone_is_refused_by_name(tiny, store):
    store.publish(make_adapter(tiny.spec, "alpha", backbone="other", backbone_sha256="cd" * 32))
    with pytest.raises(BackboneMismatch, match="trained on backbone other .cdcdcdcdcdcd., not on tiny"):
        bank_of(tiny, store).get("alpha")


def test_refused_file_goes_with_its_task(tiny, store):
    overwrite(store, "alpha", b"not an adapter at all")
    bank = bank_of(tiny, store)
    with pytest.raises(InvalidAdapter):
        bank.get("alpha")
    (store.root / "alpha" / FILE_NAME).unlink()
    with pytest.raises(UnknownTask):
        bank.get("alpha")
    assert len(bank) == 0


def test_trouble_of_the_disk_is_not_remembered(tiny, store, monkeypatch):
    """Nothing in the file's signature would tell when it is over."""
    revision = store.publish(make_adapter(tiny.spec, "alpha"))
    bank = bank_of(tiny, store)

    def fail(path: Path):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_read", fail)
        with pytest.raises(InvalidAdapter, match="Too many open files"):
            bank.get("alpha")
    assert bank.get("alpha").revision == revision


# Many threads


def numbered(spec: BackboneSpec, number: int) -> Adapter:
    """An adapter whose every part tells its number."""
    names = [f"{number}-{index}" for index in range(3)]
    adapter = make_adapter(spec, "alpha", labels=names, seed=number)
    adapter.head_weight.fill_(number)
    adapter.head_bias.fill_(number)
    adapter.prompt.fill_(number)
    return adapter


def number_of(resident: Resident) -> int:
    """The number, if all parts agree on it."""
    numbers = {int(label.split("-")[0]) for label in resident.labels}
    for tensor in (resident.head_weight, resident.head_bias, resident.tensors.prompt):
        numbers.update(tensor.unique().int().tolist())
    assert len(numbers) == 1, f"parts of several adapters: {numbers}"
    return numbers.pop()


def test_threads_see_whole_adapters_and_never_an_old_one(tiny, tmp_path):
    store = AdapterStore(tmp_path)
    bank = bank_of(tiny, store, capacity=2)
    revisions = {store.publish(numbered(tiny.spec, 0)): 0}
    published = 0
    stop = threading.Event()
    problems: list[str] = []
    looks = [0] * 8

    def look(index: int) -> None:
        try:
            while not stop.is_set():
                least = published  # what was there before the bank was asked
                resident = bank.get("alpha")
                number = number_of(resident)
                if number < least:
                    problems.append(f"{number} after {least} was published")
                if revisions.get(resident.revision, number) != number:
                    problems.append(f"revision {resident.revision} on adapter {number}")
                looks[index] += 1
        except Exception as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=look, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for number in range(1, 31):
        revisions[store.publish(numbered(tiny.spec, number))] = number
        published = number
    while min(looks) == 0 and not problems:
        stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert problems == []
    assert min(looks) > 0 and number_of(bank.get("alpha")) == 30


def test_many_tasks_in_few_places_under_threads(tiny, tmp_path):
    store = AdapterStore(tmp_path)
    tasks = [f"task-{index}" for index in range(6)]
    revisions = {task: store.publish(make_adapter(tiny.spec, task, seed=index)) for index, task in enumerate(tasks)}
    bank = bank_of(tiny, store, capacity=2)
    wrong: list[object] = []

    def look(offset: int) -> None:
        try:
            for step in range(40):
                task = tasks[(step * 5 + offset) % 6]
                resident = bank.get(task)
                if (resident.task, resident.revision) != (task, revisions[task]):
                    wrong.append(resident)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=look, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert len(bank) == 2
