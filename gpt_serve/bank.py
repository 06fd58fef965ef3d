"""Adapters on the device: loaded on first use, replaced when their file changes, least recently used leaves first."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from gpt_serve.adapter_batch import AdapterBatch
from gpt_serve.backbone import Backbone
from gpt_serve.errors import GPTServeError, UsageError
from gpt_serve.specs import Preprocess
from gpt_serve.store import AdapterStore, Signature


@dataclass(frozen=True, eq=False)
class Resident:
    """One adapter on the device.

    Attributes:
        tensors: prompts, gates and temperatures, ``A = 1``.
        head_weight: (C, D).
        head_bias: (C,).
    """

    task: str
    revision: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    tensors: AdapterBatch
    head_weight: Tensor
    head_bias: Tensor


class AdapterBank:
    """Up to ``capacity`` adapters of one store, resident on the backbone's device.

    A file that was refused is remembered by its signature, so that requests for it cost one ``stat``.

    Raises:
        UsageError: ``capacity`` is less than 1.
    """

    def __init__(self, backbone: Backbone, store: AdapterStore, capacity: int) -> None:
        if capacity < 1:
            raise UsageError(f"a bank of {capacity} adapters cannot serve any: use a capacity of 1 or more")
        self.backbone = backbone
        self.store = store
        self.capacity = capacity
        self._entries: OrderedDict[str, tuple[Signature, Resident | GPTServeError]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, task: str) -> Resident:
        """The adapter as it is on disk now.

        Raises:
            InvalidTaskName, UnknownTask, InvalidAdapter, BackboneMismatch: see `AdapterStore.load`.
        """
        with self._lock:
            try:
                signature = self.store.signature(task)
            except GPTServeError:
                self._entries.pop(task, None)
                raise
            known = self._entries.get(task)
            if known is None or known[0] != signature:
                known = self._load(task, signature)
                self._put(task, known)
            self._entries.move_to_end(task)
        if isinstance(known[1], GPTServeError):
            # A new one each time: what is raised collects a traceback, and with it the images of the batch.
            raise type(known[1])(*known[1].args)
        return known[1]

    def _load(self, task: str, signature: Signature) -> tuple[Signature, Resident | GPTServeError]:
        try:
            stored = self.store.load(task, self.backbone.spec)
        except GPTServeError as error:
            if isinstance(error.__cause__, OSError):
                raise  # the disk's trouble may pass without a trace in the signature
            return signature, error.with_traceback(None)
        adapter, device = stored.adapter, self.backbone.device
        return stored.signature, Resident(
            task=task,
            revision=stored.revision,
            labels=adapter.labels,
            preprocess=adapter.preprocess,
            tensors=AdapterBatch.of(adapter, self.backbone.spec, device),
            head_weight=adapter.head_weight.to(device),
            head_bias=adapter.head_bias.to(device),
        )

    def _put(self, task: str, entry: tuple[Signature, Resident | GPTServeError]) -> None:
        self._entries[task] = entry
        while len(self._entries) > self.capacity:
            self._entries.popitem(last=False)
