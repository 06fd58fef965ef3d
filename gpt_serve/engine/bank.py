"""Adapters on the device: promoted on first use, replaced when their file changes, pinned while a batch needs them.

Three tiers: the slab on the device, packed adapters in host memory (pinned where the device is a GPU), files on disk.
Whoever takes a resident adapter holds one revision in one slot until it releases it; a new revision gets another slot,
so no answer is computed with anything but what was taken.
"""

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from gpt_serve.adapters.store import AdapterStore, Signature, StoredAdapter
from gpt_serve.engine.slab import Packed, Place, Slab
from gpt_serve.errors import AdapterError, BankFull, GPTServeError, UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.prompted import remember
from gpt_serve.specs import Preprocess

logger = logging.getLogger("gpt_serve.engine")

DEFAULT_BANK_BYTES = 2**30
DEFAULT_HOST_BYTES = 2**30
KV_SHARE = 1 / 8
"""An adapter whose remembered keys and values would take more of the bank goes without them."""
MAX_REFUSALS = 4096
SMALLEST = 2  # rows: a head of one class, and its bias


@dataclass(frozen=True, eq=False)
class Revision:
    """One revision of a task's adapter, without what lies on the device.

    Attributes:
        knots: of what tells strangers, (Q,) on the CPU; None where the adapter cannot.
        thresholds: of labels, (C,) on the CPU, where images have several; None for one class an image.
    """

    task: str
    revision: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    signature: Signature
    knots: Tensor | None
    thresholds: Tensor | None

    @classmethod
    def of(cls, stored: StoredAdapter) -> "Revision":
        """The revision that was read from the store."""
        adapter = stored.adapter
        knots = None if adapter.unknown is None else adapter.unknown.knots
        names = adapter.task, stored.revision, adapter.labels
        return cls(*names, adapter.preprocess, stored.signature, knots, adapter.threshold)


@dataclass(frozen=True, eq=False)
class Resident(Revision):
    """One revision of one adapter on the device; valid from `AdapterBank.take` to `AdapterBank.release`."""

    place: Place

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """Weight (C, K*D) and bias (C,)."""
        return self.place.head

    @property
    def masks(self) -> bool:
        """Whether it answers with a mask: its task is one of segmentation."""
        return self.place.form.masks


class HostTier:
    """Adapters in host memory: read, checked and packed. The least recently used leaves first.

    It is not safe to share between threads: the bank holds a lock.

    Args:
        nbytes: of their tensors and labels; the objects around them take a few kilobytes more.
    """

    def __init__(self, nbytes: int) -> None:
        self._cache: LRUCache[str, tuple[Revision, Packed]] = LRUCache(nbytes, getsizeof=_host_bytes)

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return int(self._cache.currsize)

    def get(self, task: str, signature: Signature) -> tuple[Revision, Packed] | None:
        """That very version of the task's adapter, if it is here."""
        entry = self._cache.get(task)
        return None if entry is None or entry[0].signature != signature else entry

    def put(self, revision: Revision, packed: Packed) -> None:
        """Keep an adapter, unless it alone is larger than the tier."""
        self.drop(revision.task)
        if _host_bytes((revision, packed)) <= self._cache.maxsize:
            self._cache[revision.task] = revision, packed

    def drop(self, task: str) -> None:
        """Forget the task's adapter, if it is here."""
        self._cache.pop(task, None)


def _host_bytes(entry: tuple[Revision, Packed]) -> int:
    return entry[1].nbytes + sum(map(len, entry[0].labels))


@dataclass(frozen=True)
class BankStats:
    """Now: ``resident``, ``host_resident``, ``bytes_used``, ``bytes_total``. Since the start: everything else.

    Attributes:
        hits: adapters taken that were on the device.
        loads: adapters that came to the device, of which ``disk_reads`` had to be read from disk.
        evictions: adapters that left to make room.
        refused: files that could not be used.
        load_seconds: the time that ``loads`` took, from the first look at the file to the device.
    """

    resident: int = 0
    host_resident: int = 0
    bytes_used: int = 0
    bytes_total: int = 0
    hits: int = 0
    loads: int = 0
    disk_reads: int = 0
    evictions: int = 0
    refused: int = 0
    load_seconds: float = 0.0


class AdapterBank:
    """The adapters of one store on the backbone's device. Safe to share between threads.

    Args:
        backbone: its device holds the slab, in its weights' dtype.
        store: read as it is now: each look costs one ``stat``.
        bank_bytes: size of the slab.
        host_bytes: size of the host tier; 0 for none.

    Raises:
        UsageError: a size that cannot work.
    """

    def __init__(
        self,
        backbone: Backbone,
        store: AdapterStore,
        *,
        bank_bytes: int = DEFAULT_BANK_BYTES,
        host_bytes: int = DEFAULT_HOST_BYTES,
    ) -> None:
        if bank_bytes < 1 or host_bytes < 0:
            raise UsageError(f"a bank of {bank_bytes} bytes with {host_bytes} on the host cannot work: use more")
        self.backbone = backbone
        self.store = store
        self._slab = _make_slab(backbone, bank_bytes)
        if self._slab.capacity < SMALLEST:
            needed = (SMALLEST + 1) * self._slab.row_bytes
            raise UsageError(f"a bank of {bank_bytes} bytes holds no adapter: use {needed} or many more --bank-bytes")
        self._host = HostTier(host_bytes)
        self._resident: OrderedDict[str, Resident] = OrderedDict()  # the least recently used first
        self._pins: Counter[Resident] = Counter()
        self._refused: OrderedDict[str, tuple[Signature, GPTServeError]] = OrderedDict()
        self._loading: set[str] = set()
        self._changed = threading.Condition()  # guards everything above; notified when a load or a pin ends
        self._counts: Counter[str] = Counter()
        self._load_seconds = 0.0
        cuda = backbone.device.type == "cuda"
        self._stream = torch.cuda.Stream(backbone.device) if cuda else None  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._resident)

    def stats(self) -> BankStats:
        """What it holds and what it did."""
        with self._changed:
            return BankStats(
                resident=len(self._resident),
                host_resident=len(self._host),
                bytes_used=self._slab.used_bytes,
                bytes_total=self._slab.capacity * self._slab.row_bytes,
                load_seconds=self._load_seconds,
                **self._counts,
            )

    def try_take(self, task: str) -> Resident | None:
        """The adapter as it is on disk now, pinned, if it is on the device; None if it has to be loaded first.

        Raises:
            InvalidTaskName, UnknownTask, InvalidAdapter, BackboneMismatch: see `AdapterStore.load`. A file that was
                refused is known by its signature.
        """
        signature = self._look(task)
        with self._changed:
            return self._take_resident(task, signature)

    def take(self, task: str, timeout: float | None = None) -> Resident:
        """The adapter as it is on disk now, pinned; loaded if need be, once for all who wait for it.

        A file that is refused does not end the service of the revision that it replaced, as long as that is on the
        device: a broken publication is the publisher's mistake, and for the operator to read in the log.

        Args:
            timeout: seconds to wait while everything in the bank is pinned; None for ever.

        Raises:
            InvalidTaskName, UnknownTask, InvalidAdapter, BackboneMismatch: as `try_take`.
            BankFull: the time passed, or the adapter is larger than the bank.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            signature = self._look(task)
            with self._changed:
                resident = self._take_resident(task, signature)
                if resident is not None:
                    return resident
                if task in self._loading:
                    self._wait(deadline, task)
                    continue
                self._loading.add(task)
            try:
                return self._load(task, signature, deadline)
            except AdapterError:
                if not self._outlived(task, signature):
                    raise
            finally:
                with self._changed:
                    self._loading.discard(task)
                    self._changed.notify_all()

    def release(self, resident: Resident) -> None:
        """Give back what `take` or `try_take` returned, once for each time that it was taken."""
        with self._changed:
            self._pins[resident] -= 1
            if self._pins[resident] > 0:
                return
            del self._pins[resident]
            if self._resident.get(resident.task) is not resident:  # replaced or removed meanwhile
                self._slab.free(resident.place)
            self._changed.notify_all()

    @contextmanager
    def holding(self, task: str) -> Iterator[Resident]:
        """`take`, and `release` at the end."""
        resident = self.take(task)
        try:
            yield resident
        finally:
            self.release(resident)

    def _look(self, task: str) -> Signature:
        """The task's version on disk; one that is gone leaves the bank."""
        try:
            return self.store.signature(task)
        except GPTServeError:
            with self._changed:
                self._retire(task)
                self._host.drop(task)
                self._refused.pop(task, None)
            raise

    def _take_resident(self, task: str, signature: Signature) -> Resident | None:
        refusal, resident = self._refused.get(task), self._resident.get(task)
        refused = refusal is not None and refusal[0] == signature
        if resident is None or (resident.signature != signature and not refused):
            if refused and refusal is not None:
                raise refusal[1].fresh()
            return None
        self._resident.move_to_end(task)
        self._pins[resident] += 1
        self._counts["hits"] += 1
        return resident

    def _outlived(self, task: str, signature: Signature) -> bool:
        """Whether that version was refused while the one before it is still here, to be served on."""
        with self._changed:
            refusal = self._refused.get(task)
            return refusal is not None and refusal[0] == signature and task in self._resident

    def _load(self, task: str, signature: Signature, deadline: float | None) -> Resident:
        """Bring the adapter to the device; the caller is the only one to do so."""
        began = time.perf_counter()
        revision, packed = self._stage(task, signature)
        place = self._reserve(task, packed, deadline)
        try:
            self._fill(place, packed)
        except BaseException:
            with self._changed:
                self._slab.free(place)
            raise
        resident = Resident(**vars(revision), place=place)
        with self._changed:
            self._retire(task)
            self._resident[task] = resident
            self._pins[resident] = 1
            self._counts["loads"] += 1
            self._load_seconds += time.perf_counter() - began
        return resident

    def _stage(self, task: str, signature: Signature) -> tuple[Revision, Packed]:
        """The adapter in host memory, read from disk if need be."""
        with self._changed:
            staged = self._host.get(task, signature)
        if staged is not None:
            return staged
        try:
            stored = self.store.load(task, self.backbone.spec)
        except GPTServeError as error:
            self._refuse(task, signature, error)
            raise
        revision = Revision.of(stored)
        packed = Packed.of(stored.adapter, self.backbone.spec, pinned=self._stream is not None)
        with self._changed:
            self._host.put(revision, packed)
            self._counts["disk_reads"] += 1
        return revision, packed

    def _refuse(self, task: str, signature: Signature, error: GPTServeError) -> None:
        if isinstance(error.__cause__, OSError):
            return  # the disk's trouble may pass without a trace in the signature
        with self._changed:
            self._refused[task] = signature, error.fresh()
            self._counts["refused"] += 1
            if len(self._refused) > MAX_REFUSALS:
                self._refused.popitem(last=False)
            resident = self._resident.get(task)
        if resident is not None:
            logger.error("%s; revision %s is served on", error, resident.revision)

    def _reserve(self, task: str, packed: Packed, deadline: float | None) -> Place:
        """Room in the slab; the least recently used adapters that nobody holds leave for it."""
        remembered = self._remembered(packed)
        if packed.extent() > self._slab.capacity:
            needed, there = packed.extent() * self._slab.row_bytes, self._slab.capacity * self._slab.row_bytes
            raise BankFull(f"adapter {task!r} takes {needed} bytes, and the bank has {there}: use more --bank-bytes")
        with self._changed:
            while True:
                place = self._slab.reserve(packed, remembered)
                if place is not None:
                    return place
                if not self._evict():
                    self._wait(deadline, task)

    def _remembered(self, packed: Packed) -> int:
        """How many blocks' keys and values are kept for the adapter."""
        constant = packed.layout.constant
        whole, capacity = packed.extent(constant), self._slab.capacity
        too_large = whole > capacity or whole - packed.extent() > KV_SHARE * capacity
        attention: Any = self.backbone.model.blocks[0].attn
        if too_large or attention.attn_dim != self.backbone.spec.width:
            return 0
        return constant

    def _evict(self) -> bool:
        """Free the adapter that nobody has used for longest; false when all are held."""
        for task, resident in self._resident.items():
            if not self._pins[resident]:
                self._retire(task)
                self._counts["evictions"] += 1
                return True
        return False

    def _retire(self, task: str) -> None:
        """No longer answer with the task's adapter; its room is free once nobody holds it."""
        resident = self._resident.pop(task, None)
        if resident is not None and not self._pins[resident]:
            self._slab.free(resident.place)
            self._changed.notify_all()

    def _wait(self, deadline: float | None, task: str) -> None:
        """Until something changed; `BankFull` when the time is over."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise BankFull(f"no room in the bank for adapter {task!r} in time: try again, or use more --bank-bytes")
        self._changed.wait(left)

    @torch.inference_mode()
    def _fill(self, place: Place, packed: Packed) -> None:
        """Write the adapter and compute what it remembers, beside whatever else the device is doing."""
        context: AbstractContextManager[object] = nullcontext()
        if self._stream is not None:
            context = torch.cuda.stream(self._stream)
        with context:
            self._slab.write(place, packed)
            if place.layout.remembered:
                self._slab.write_kv(place, remember(self.backbone.model, place.unremembered))
        if self._stream is not None:
            self._stream.synchronize()


def _make_slab(backbone: Backbone, nbytes: int) -> Slab:
    try:
        return Slab(backbone.spec, nbytes, backbone.device, backbone.dtype)
    except RuntimeError as error:  # torch's own, of which running out of a GPU's memory is one
        raise UsageError(
            f"a bank of {nbytes} bytes cannot be had on {backbone.device}: use fewer --bank-bytes"
        ) from error
