"""What a module is trained on: images, or what the frozen blocks before the first that it touches make of them.

Those blocks give the same for the same image whatever is learned behind them. `TrunkInputs` computes them once for each
image as it is and for each of its augmented forms, where their number is fixed, and keeps what they gave in a file that
has no name, so that nothing is left when the process ends, however it ends. From the second time on, an epoch costs
only the blocks behind. What finds no room is computed again.

Shapes: images ``n``, batch ``B``, patch tokens ``N``, width ``D``.
"""

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from gpt_serve.errors import UsageError
from gpt_serve.images.preprocess import normalize
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.prompted import Trunk, embed, run_trunk
from gpt_serve.specs import Preprocess, Tap
from gpt_serve.train.data.datasets import Split
from gpt_serve.train.data.views import View

CACHE_BYTES = 4 << 30
"""How much `TrunkInputs` keeps unless it is told otherwise: at 126 pixels 34,000 images of a ViT-S/14."""

Batch = tuple[Tensor | Trunk, Tensor]
"""Images, uint8 (B, 3, H, W), or their `Trunk`; and targets, int64 (B,) or (B, C)."""


class Inputs:
    """Batches of images as they are read.

    Args:
        workers: number of processes that decode when the images are not in memory.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def batches(self, view: View, indices: list[list[int]]) -> Iterator[Batch]:
        """Yield the batches of the images at ``indices``, a list of places for each; see `View.batches`."""
        yield from view.batches(indices, self.workers)


class TrunkInputs(Inputs):
    """Batches of what the first ``block`` blocks of a backbone make of images, kept where the images come again.

    Args:
        block: how many blocks; all of them where a head alone is learned.
        taps: those of these blocks that anybody reads.
        room: how many bytes to keep at most.
    """

    def __init__(self, backbone: Backbone, workers: int, block: int, taps: Sequence[Tap], room: int) -> None:
        super().__init__(workers)
        self.backbone = backbone
        self.block = block
        self.taps = tuple(tap for tap in taps if tap.block < block)
        self._kept = _Kept(room)
        self._places: dict[tuple[int, str, int], np.ndarray] = {}
        self._splits: dict[int, Split] = {}  # whose ids are keys: none may be freed and its id be given to another

    def batches(self, view: View, indices: list[list[int]]) -> Iterator[Batch]:
        """Yield the batches of the images at ``indices``; those that nothing is kept of are read and computed.

        Raises:
            DataError: an image can no longer be read.
            UsageError: the disk has no room for what is to be kept.
        """
        places = self._places_of(view) if view.forms else np.full(len(view), _NOWHERE)
        new = [places[batch] < 0 for batch in indices]
        missing = [np.array(batch)[fresh].tolist() for batch, fresh in zip(indices, new, strict=True)]
        loader = view.batches([batch for batch in missing if batch], self.workers)
        for batch, fresh, absent in zip(indices, new, missing, strict=True):
            computed = self._compute(next(loader)[0], view.preprocess) if absent else None
            if computed is not None and view.forms:
                places[absent] = self._kept.add(computed)
            rows = self._joined(computed, places[batch], fresh)
            yield rows, view.targets(batch)

    def _places_of(self, view: View) -> np.ndarray:
        """(n,) the row at which each image of the view, in its present form, is kept; -1 where it is not."""
        key = (id(view.samples), view.augment, view.variant)
        self._splits[key[0]] = view.samples
        return self._places.setdefault(key, np.full(len(view), _NOWHERE))

    @torch.no_grad()
    def _compute(self, images: Tensor, preprocess: Preprocess) -> list[Tensor]:
        """The tokens (B, prefix + N, D) and what each tap reads, float32; no tokens where nobody goes on from them."""
        backbone = self.backbone
        with autocast(backbone):
            pixels = normalized(images.to(backbone.device), preprocess)
            trunk = run_trunk(backbone.model, embed(backbone.model, pixels), self.block, self.taps)
        tokens = trunk.tokens if self.block < backbone.spec.depth else trunk.tokens[:, :0]
        return [tensor.float().cpu() for tensor in (tokens, *(trunk.tapped[tap] for tap in self.taps))]

    def _joined(self, computed: list[Tensor] | None, places: np.ndarray, fresh: np.ndarray) -> Trunk:
        """A batch of rows that are kept and of rows that were ``computed``, which are those that are ``fresh``."""
        if computed is None or not fresh.all():
            kept = self._kept.rows(places[~fresh])
            parts = kept if computed is None else [_merged(*pair, fresh) for pair in zip(computed, kept, strict=True)]
        else:
            parts = computed
        return Trunk(self.block, parts[0], dict(zip(self.taps, parts[1:], strict=True)))


_NOWHERE = -1


class _Kept:
    """Rows of float32 tensors in a memory-mapped file without a name, as many as ``room`` bytes hold."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.count = 0
        self.shapes: list[torch.Size] = []
        self.sizes: list[int] = []
        self.file = tempfile.TemporaryFile(prefix="gpt-serve-")  # noqa: SIM115 open as long as this is there
        weakref.finalize(self, self.file.close)

    def add(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """Keep a row for each image, as far as there is room; returns their places (B,), -1 for those without."""
        self.shapes = [tensor.shape[1:] for tensor in tensors]
        self.sizes = [prod(shape) for shape in self.shapes]
        most = self.room // (4 * sum(self.sizes)) - self.count
        rows = torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)[: max(0, most)]
        try:
            self.file.seek(0, 2)
            self.file.write(rows.numpy().tobytes())
            self.file.flush()
        except OSError as error:
            raise UsageError(
                f"what frozen blocks gave cannot be kept in {tempfile.gettempdir()}: {error.strerror}: lower "
                "--cache-bytes, or name a folder with more room in TMPDIR"
            ) from error
        places = np.full(len(tensors[0]), _NOWHERE)
        places[: len(rows)] = np.arange(self.count, self.count + len(rows))
        self.count += len(rows)
        return places

    def rows(self, places: np.ndarray) -> list[Tensor]:
        """The tensors of the rows at ``places``, as they were given."""
        stored = np.memmap(self.file, np.float32, "r", shape=(self.count, sum(self.sizes)))
        parts = torch.split(torch.from_numpy(stored[places]), self.sizes, dim=1)
        return [part.reshape(len(part), *shape) for part, shape in zip(parts, self.shapes, strict=True)]


def _merged(computed: Tensor, kept: Tensor, fresh: np.ndarray) -> Tensor:
    """Rows in the order of a batch: those that are ``fresh`` from ``computed``, the others from ``kept``."""
    merged = computed.new_empty(len(fresh), *computed.shape[1:])
    merged[fresh], merged[~fresh] = computed, kept
    return merged


def normalized(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 (B, 3, H, W) as the task's preprocessing normalises them, on their device."""
    mean, std = (torch.tensor(value, device=images.device) for value in (preprocess.mean, preprocess.std))
    return normalize(images, mean, std)


def autocast(backbone: Backbone) -> torch.autocast:
    """bf16 on CUDA, nothing elsewhere."""
    kind = backbone.device.type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")
