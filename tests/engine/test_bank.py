"""Adapters on the device: what is loaded when, and what leaves."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_serve.adapters import folder as folder_module
from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import FILE_NAME, AdapterStore, StoredAdapter
from gpt_serve.engine.bank import AdapterBank, Resident
from gpt_serve.engine.slab import Packed
from gpt_serve.errors import (
    BackboneMismatch,
    BankFull,
    GPTServeError,
    InvalidAdapter,
    InvalidTaskName,
    UnknownTask,
    UsageError,
)
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import BackboneSpec
from tests.factories import make_adapter, remove_adapter


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


def room(spec: BackboneSpec, *adapters: Adapter) -> int:
    """Bytes of a bank that just holds ``adapters``."""
    rows = 0
    for adapter in adapters:
        packed = Packed.of(adapter, spec)
        rows += packed.extent(packed.layout.constant)
    return (rows + 1) * 4 * spec.width  # row 0 pads


def bank_of(backbone: Backbone, store: AdapterStore, holds: int | None = None, **options: Any) -> AdapterBank:
    """A bank for ``holds`` adapters as `make_adapter` makes them."""
    if holds is not None:
        options["bank_bytes"] = room(backbone.spec, *[make_adapter(backbone.spec)] * holds)
    return AdapterBank(backbone, store, **options)


def get(bank: AdapterBank, task: str) -> Resident:
    """Take and release: good for looking at what does not change."""
    with bank.holding(task) as resident:
        return resident


def overwrite(store: AdapterStore, task: str, data: bytes) -> None:
    """Replace a file as a careless script would, but with a rename."""
    path = store.root / task / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "new").write_bytes(data)
    (path.parent / "new").replace(path)


def test_resident_is_the_file(tiny, store):
    adapter = make_adapter(tiny.spec, "alpha", method="gated", prompts=4, classes=6)
    revision = store.publish(adapter)
    resident = get(bank_of(tiny, store), "alpha")
    assert (resident.task, resident.revision, resident.labels) == ("alpha", revision, adapter.labels)
    assert resident.preprocess == adapter.preprocess
    weight, bias = resident.head
    tensors = resident.place.batch
    assert torch.equal(weight, adapter.head_weight) and torch.equal(bias, adapter.head_bias)
    assert torch.equal(tensors.prompt[0], adapter.prompt)
    assert torch.equal(tensors.gate[0], adapter.gamma.sigmoid())
    assert torch.equal(tensors.tau[0], adapter.tau)


def test_loaded_once(tiny, store):
    store.publish(make_adapter(tiny.spec, "alpha"))
    bank = bank_of(tiny, store)
    assert get(bank, "alpha") is get(bank, "alpha")
    assert store.loads == ["alpha"]


def test_least_recently_used_leaves_first(tiny, store):
    for task in ("a", "b", "c"):
        store.publish(make_adapter(tiny.spec, task))
    bank = bank_of(tiny, store, holds=2, host_bytes=0)
    for task in ("a", "b", "a", "c", "a"):  # c pushes out b
        get(bank, task)
    assert store.loads == ["a", "b", "c"]
    assert len(bank) == 2
    get(bank, "b")  # which pushes out c
    get(bank, "a")
    assert store.loads == ["a", "b", "c", "b"]
    get(bank, "c")
    assert store.loads == ["a", "b", "c", "b", "c"]
    assert len(bank) == 2


def test_capacity_of_one(tiny, store):
    for task in ("a", "b"):
        store.publish(make_adapter(tiny.spec, task))
    bank = bank_of(tiny, store, holds=1, host_bytes=0)
    assert [get(bank, task).task for task in ("a", "b", "b", "a")] == ["a", "b", "b", "a"]
    assert store.loads == ["a", "b", "a"]


@pytest.mark.parametrize("sizes", [{"bank_bytes": 0}, {"bank_bytes": -1}, {"host_bytes": -1}], ids=str)
def test_sizes_that_cannot_work(tiny, store, sizes):
    with pytest.raises(UsageError, match="cannot work: use more"):
        bank_of(tiny, store, **sizes)


def test_reloaded_when_the_file_changes(tiny, store):
    first = store.publish(make_adapter(tiny.spec, "alpha", seed=1))
    bank = bank_of(tiny, store)
    assert get(bank, "alpha").revision == first
    second = store.publish(make_adapter(tiny.spec, "alpha", seed=2))
    assert get(bank, "alpha").revision == second != first
    assert get(bank, "alpha").revision == second
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
    assert get(bank, "alpha").revision == AdapterStore(tmp_path).load("alpha").revision
    get(bank, "alpha")
    assert store.loads == ["alpha"]


def test_removed_adapter_is_unknown_and_dropped(tiny, store):
    store.publish(make_adapter(tiny.spec, "alpha"))
    bank = bank_of(tiny, store)
    get(bank, "alpha")
    remove_adapter(store, "alpha")
    with pytest.raises(UnknownTask, match="unknown task 'alpha'"):
        get(bank, "alpha")
    assert len(bank) == 0


def test_names_that_cannot_exist_cost_nothing(tiny, store):
    bank = bank_of(tiny, store)
    for task, error in [("nobody", UnknownTask), ("../alpha", InvalidTaskName), ("", InvalidTaskName)]:
        with pytest.raises(error):
            get(bank, task)
    assert store.loads == [] and len(bank) == 0


# Refused files


def test_refused_file_is_read_once(tiny, store):
    overwrite(store, "alpha", b"not an adapter at all")
    bank = bank_of(tiny, store)
    messages = set()
    for _ in range(5):
        with pytest.raises(InvalidAdapter) as caught:
            get(bank, "alpha")
        messages.add(str(caught.value))
    assert store.loads == ["alpha"]
    assert len(messages) == 1 and "adapter 'alpha' is refused" in messages.pop()


def test_refusal_is_a_new_error_each_time(tiny, store):
    """One object raised again and again, by many threads, would collect all their frames."""
    overwrite(store, "alpha", b"not an adapter at all")
    bank = bank_of(tiny, store)
    errors: list[GPTServeError] = []
    for _ in range(4):
        with pytest.raises(InvalidAdapter) as caught:
            get(bank, "alpha")
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 4
    depths = []
    for error in errors:
        depth, entry = 0, error.__traceback__
        while entry is not None:
            depth, entry = depth + 1, entry.tb_next
        depths.append(depth)
    assert depths[1:] == [depths[1]] * 3  # the first one comes from the reading


def test_fixed_file_is_taken(tiny, store):
    overwrite(store, "alpha", b"not an adapter at all")
    bank = bank_of(tiny, store)
    with pytest.raises(InvalidAdapter):
        get(bank, "alpha")
    revision = store.publish(make_adapter(tiny.spec, "alpha"))
    assert get(bank, "alpha").revision == revision
    assert store.loads == ["alpha"] * 2


def test_a_broken_replacement_does_not_end_the_revision_that_is_served(tiny, store, caplog):
    """Until it is replaced by a good one, or leaves the device: then the task is refused."""
    good = store.publish(make_adapter(tiny.spec, "alpha"))
    bank = bank_of(tiny, store)
    assert get(bank, "alpha").revision == good
    overwrite(store, "alpha", b"cut off on its way")
    for _ in range(3):
        assert get(bank, "alpha").revision == good
    assert bank.try_take("alpha").revision == good
    assert store.loads == ["alpha"] * 2, "the broken file is read once"
    assert bank.stats().refused == 1
    revision = store.publish(make_adapter(tiny.spec, "alpha", seed=5))
    assert get(bank, "alpha").revision == revision != good


def test_a_bank_that_can_hold_nothing_is_refused(tiny, store):
    with pytest.raises(UsageError, match="holds no adapter: use [0-9]+ or many more --bank-bytes"):
        AdapterBank(tiny, store, bank_bytes=1)


def test_adapter_of_another_backbone_is_refused_by_name(tiny, store):
    store.publish(make_adapter(tiny.spec, "alpha", backbone="other", backbone_sha256="cd" * 32))
    with pytest.raises(BackboneMismatch, match="trained on backbone other .cdcdcdcdcdcd., not on tiny"):
        get(bank_of(tiny, store), "alpha")


def test_refused_file_goes_with_its_task(tiny, store):
    overwrite(store, "alpha", b"not an adapter at all")
    bank = bank_of(tiny, store)
    with pytest.raises(InvalidAdapter):
        get(bank, "alpha")
    (store.root / "alpha" / FILE_NAME).unlink()
    with pytest.raises(UnknownTask):
        get(bank, "alpha")
    assert len(bank) == 0


def test_trouble_of_the_disk_is_not_remembered(tiny, store, monkeypatch):
    """Nothing in the file's signature would tell when it is over."""
    revision = store.publish(make_adapter(tiny.spec, "alpha"))
    bank = bank_of(tiny, store)

    def fail(path: Path):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "_read", fail)
        with pytest.raises(InvalidAdapter, match="Too many open files"):
            get(bank, "alpha")
    assert get(bank, "alpha").revision == revision


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
    for tensor in (*resident.head, resident.place.batch.prompt):
        numbers.update(tensor.unique().int().tolist())
    assert len(numbers) == 1, f"parts of several adapters: {numbers}"
    return numbers.pop()


def test_threads_see_whole_adapters_and_never_an_old_one(tiny, tmp_path):
    store = AdapterStore(tmp_path)
    bank = bank_of(tiny, store, holds=2)
    revisions = {store.publish(numbered(tiny.spec, 0)): 0}
    published = 0
    stop = threading.Event()
    problems: list[str] = []
    looks = [0] * 8

    def look(index: int) -> None:
        try:
            while not stop.is_set():
                least = published  # what was there before the bank was asked
                with bank.holding("alpha") as resident:
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
    assert min(looks) > 0 and number_of(get(bank, "alpha")) == 30


def test_many_tasks_in_few_places_under_threads(tiny, tmp_path):
    store = AdapterStore(tmp_path)
    tasks = [f"task-{index}" for index in range(6)]
    adapters = {task: make_adapter(tiny.spec, task, seed=index) for index, task in enumerate(tasks)}
    revisions = {task: store.publish(adapter) for task, adapter in adapters.items()}
    heads = {task: adapter.head_weight for task, adapter in adapters.items()}
    bank = bank_of(tiny, store, holds=2)
    wrong: list[object] = []

    def look(offset: int) -> None:
        try:
            for step in range(40):
                task = tasks[(step * 5 + offset) % 6]
                with bank.holding(task) as resident:
                    seen = resident.head[0].clone()
                if not torch.equal(seen, heads[task]) or (resident.task, resident.revision) != (task, revisions[task]):
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


# Pins, tiers, room


def test_what_is_held_stays(tiny, store):
    for seed, task in enumerate("ab"):
        store.publish(make_adapter(tiny.spec, task, seed=seed))
    bank = bank_of(tiny, store, holds=1)
    held = bank.take("a")
    before = held.head[0].clone()
    with pytest.raises(BankFull, match="no room in the bank for adapter 'b' in time"):
        bank.take("b", timeout=0.01)
    assert bank.try_take("b") is None
    bank.release(held)
    bank.release(bank.take("b", timeout=0))
    assert not torch.equal(held.head[0], before), "its room was not used again"


def test_who_waits_for_room_gets_it_when_it_is_free(tiny, store):
    for task in "ab":
        store.publish(make_adapter(tiny.spec, task))
    bank = bank_of(tiny, store, holds=1)
    held = bank.take("a")
    taken: list[Resident] = []
    thread = threading.Thread(target=lambda: taken.append(bank.take("b")))
    thread.start()
    thread.join(0.1)
    assert taken == []
    bank.release(held)
    thread.join(30)
    assert [resident.task for resident in taken] == ["b"]


def test_held_twice_released_twice(tiny, store):
    for task in "ab":
        store.publish(make_adapter(tiny.spec, task))
    bank = bank_of(tiny, store, holds=1)
    first, second = bank.take("a"), bank.try_take("a")
    assert first is second
    bank.release(first)
    with pytest.raises(BankFull):
        bank.take("b", timeout=0)
    bank.release(first)
    assert bank.take("b", timeout=0).task == "b"


def test_an_old_revision_keeps_its_slot_while_it_is_held(tiny, store):
    old = make_adapter(tiny.spec, "alpha", seed=1)
    store.publish(old)
    bank = bank_of(tiny, store, holds=3)
    held = bank.take("alpha")
    for seed in (2, 3):
        store.publish(make_adapter(tiny.spec, "alpha", seed=seed))
        assert get(bank, "alpha").revision != held.revision
    remove_adapter(store, "alpha")
    with pytest.raises(UnknownTask):
        bank.take("alpha")
    assert torch.equal(held.head[0], old.head_weight)
    assert len(bank) == 0 and bank.stats().bytes_used > 0
    bank.release(held)
    assert bank.stats().bytes_used == 0


def test_an_adapter_larger_than_the_bank(tiny, store):
    store.publish(make_adapter(tiny.spec, "alpha", prompts=50))
    with pytest.raises(BankFull, match="adapter 'alpha' takes [0-9]+ bytes, and the bank has [0-9]+: use more --bank"):
        bank_of(tiny, store, holds=1).take("alpha")


def test_the_host_tier_saves_reading(tiny, store):
    for task in "ab":
        store.publish(make_adapter(tiny.spec, task))
    bank = bank_of(tiny, store, holds=1)
    for task in "ababab":
        get(bank, task)
    stats = bank.stats()
    assert store.loads == ["a", "b"] and stats.disk_reads == 2
    assert (stats.loads, stats.evictions, stats.hits, stats.resident, stats.host_resident) == (6, 5, 0, 1, 2)
    assert stats.load_seconds > 0 and stats.bytes_used == stats.bytes_total
    store.publish(make_adapter(tiny.spec, "b", seed=9))
    assert get(bank, "b").revision == store.load("b").revision, "an old version came from the host tier"


def test_the_host_tier_is_bounded(tiny, store):
    adapters = [make_adapter(tiny.spec, task) for task in "abc"]
    for adapter in adapters:
        store.publish(adapter)
    one = Packed.of(adapters[0], tiny.spec).nbytes + sum(map(len, adapters[0].labels))
    bank = bank_of(tiny, store, host_bytes=2 * one)
    for task in "abc":
        get(bank, task)
    assert bank.stats().host_resident == 2
    none = bank_of(tiny, store, host_bytes=one - 1)
    get(none, "a")
    assert none.stats().host_resident == 0


def test_a_load_is_shared_and_holds_up_no_other(tiny, tmp_path):
    gate, started = threading.Event(), threading.Event()

    class Slow(CountingStore):
        def load(self, task: str, spec: BackboneSpec | None = None) -> StoredAdapter:
            if task == "slow":
                started.set()
                assert gate.wait(30)
            return super().load(task, spec)

    store = Slow(tmp_path)
    for task in ("slow", "quick"):
        store.publish(make_adapter(tiny.spec, task))
    bank = bank_of(tiny, store)
    taken: list[Resident] = []
    threads = [threading.Thread(target=lambda: taken.append(bank.take("slow"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert started.wait(30)
    assert bank.take("quick", timeout=30).task == "quick" and taken == []
    gate.set()
    for thread in threads:
        thread.join(30)
    assert len(taken) == 4 and len(set(map(id, taken))) == 1
    assert store.loads.count("slow") == 1


def test_keys_and_values_of_closed_adapters_are_remembered_when_there_is_room(tiny, store):
    store.publish(make_adapter(tiny.spec, "deep", method="vpt-deep", pool="cls"))
    store.publish(make_adapter(tiny.spec, "open"))
    generous, tight = bank_of(tiny, store), bank_of(tiny, store, bank_bytes=40 * 4 * tiny.spec.width)
    assert get(generous, "deep").place.layout.remembered == tiny.spec.depth
    assert get(generous, "open").place.layout.remembered == 0
    assert get(tight, "deep").place.layout.remembered == 0


def test_an_adapter_that_only_fits_without_what_is_remembered(tiny, store):
    deep = make_adapter(tiny.spec, "deep", method="vpt-deep", prompts=1, classes=60)
    store.publish(deep)
    rows = Packed.of(deep, tiny.spec).extent()
    bank = bank_of(tiny, store, bank_bytes=(rows + 1) * 4 * tiny.spec.width)
    assert get(bank, "deep").place.layout.remembered == 0
