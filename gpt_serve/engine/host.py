"""Adapters in host memory: read, checked and packed, ready to be copied to the device."""

from collections import OrderedDict
from dataclasses import dataclass

from gpt_serve.adapters.store import Signature, StoredAdapter
from gpt_serve.engine.slab import Packed
from gpt_serve.specs import BackboneSpec, Preprocess


@dataclass(frozen=True, eq=False)
class Staged:
    """One revision of one adapter, without a place on the device."""

    task: str
    revision: str
    signature: Signature
    labels: tuple[str, ...]
    preprocess: Preprocess
    packed: Packed

    @classmethod
    def of(cls, stored: StoredAdapter, spec: BackboneSpec, *, pinned: bool) -> "Staged":
        """What serving needs of a stored adapter of the backbone ``spec``."""
        adapter = stored.adapter
        packed = Packed.of(adapter, spec, pinned=pinned)
        return cls(adapter.task, stored.revision, stored.signature, adapter.labels, adapter.preprocess, packed)

    @property
    def nbytes(self) -> int:
        """Its tensors and the characters of its labels; the objects around them take a few kilobytes more."""
        return self.packed.nbytes + sum(map(len, self.labels))


class HostTier:
    """Up to ``nbytes`` of staged adapters; the least recently used leaves first. The bank's lock guards it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.used = 0
        self._staged: OrderedDict[str, Staged] = OrderedDict()

    def __len__(self) -> int:
        return len(self._staged)

    def get(self, task: str, signature: Signature) -> Staged | None:
        """That very version of the task's adapter, if it is here."""
        staged = self._staged.get(task)
        if staged is None or staged.signature != signature:
            return None
        self._staged.move_to_end(task)
        return staged

    def put(self, staged: Staged) -> None:
        """Keep ``staged``, unless it alone is larger than the tier."""
        self.drop(staged.task)
        if staged.nbytes > self.nbytes:
            return
        self._staged[staged.task] = staged
        self.used += staged.nbytes
        while self.used > self.nbytes:
            self.drop(next(iter(self._staged)))

    def drop(self, task: str) -> None:
        """Forget the task's adapter, if it is here."""
        staged = self._staged.pop(task, None)
        if staged is not None:
            self.used -= staged.nbytes
