"""The training loop: epochs, validation, checkpoints."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpt_serve.errors import DataError
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.prompted import Trunk
from gpt_serve.specs import Preprocess
from gpt_serve.train.data.views import View, ordered_batches, shuffled_batches
from gpt_serve.train.distributed import World
from gpt_serve.train.inputs import Batch, Inputs, autocast, normalized
from gpt_serve.train.methods.modules import TaskModule
from gpt_serve.train.objective import loss_sum, right_sum
from gpt_serve.train.recipes.recipe import Recipe, Select, learning_rate

EVAL_BATCH = 128
SHIFT_SCALE = 0.1  # the rate of shifts as a multiple of the prompts': they are added to every token of every block
ALONE = World()
START = -1
"""In place of an epoch: what training starts from, where that is an answer already, as a discriminant head is."""


@dataclass(frozen=True)
class Score:
    """Accuracy, a share in [0, 1], and mean loss on a split."""

    accuracy: float
    loss: float

    def rank(self, select: Select) -> tuple[float, float]:
        """Larger is better: by accuracy, then by loss; or the other way round."""
        return (self.accuracy, -self.loss) if select == "accuracy" else (-self.loss, self.accuracy)


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch showed. Accuracies are shares in [0, 1]; those on validation images NaN where there are none."""

    epoch: int
    lr: float  # at the epoch's start
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    images_per_second: float
    nmi: list[float] | None = None  # of each block, where it is measured

    @property
    def val(self) -> Score:
        """The score on the validation images."""
        return Score(self.val_accuracy, self.val_loss)


@dataclass
class Progress:
    """Everything that resuming needs; what a checkpoint holds."""

    epoch: int = 0
    best_epoch: int = START
    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[EpochRecord] = field(default_factory=list)
    start: EpochRecord | None = None

    @property
    def best_record(self) -> EpochRecord:
        """Of the epoch whose tensors are kept, or of the start where no epoch was better."""
        if self.best_epoch != START:
            return self.history[self.best_epoch]
        assert self.start is not None
        return self.start


OnBatch = Callable[[int, float, float, int], object]  # epoch, running loss, running accuracy, images
NmiProbe = Callable[[], list[float]]  # the module's NMI by block, as it is now


class Trainer:
    """Fits one `TaskModule` on a frozen backbone and keeps the best epoch by validation, without it the last."""

    def __init__(
        self,
        backbone: Backbone,
        module: TaskModule,
        recipe: Recipe,
        train: View,
        val: View | None,
        *,
        world: World,
        inputs: Inputs,
        nmi: NmiProbe | None = None,
    ) -> None:
        self.backbone = backbone
        self.module = module.to(backbone.device)
        self.recipe = recipe
        self.train_view = train
        self.val_view = val
        self.world = world
        self.inputs = inputs
        self.nmi = nmi
        self.progress = Progress()
        self.optimizer = _optimizer(module, recipe)
        world.broadcast([*module.parameters(), *module.buffers()])

    def fit(self, on_batch: OnBatch, on_epoch: Callable[[EpochRecord], object]) -> Progress:
        """Run the epochs that are left. ``on_epoch`` is called after each, when `state` is safe to store.

        Raises:
            DataError: the loss is no longer finite.
        """
        self.score_start()
        for epoch in range(self.progress.epoch, self.recipe.epochs):
            record = self._epoch(epoch, on_batch)
            self.progress.history.append(record)
            select = self.recipe.select
            if (
                self.val_view is None
                or not self.progress.best
                or record.val.rank(select) > self.progress.best_record.val.rank(select)
            ):
                self._keep(epoch)
            self.progress.epoch = epoch + 1
            on_epoch(record)
        return self.progress

    def score_start(self) -> Progress:
        """Keep and score what training starts from like an epoch, where its head is an answer already."""
        if self.recipe.head_init == "lda" and not self.progress.epoch and self.progress.start is None:
            val = self._validate()
            unknown = math.nan
            self.progress.start = EpochRecord(START, 0.0, unknown, unknown, val.loss, val.accuracy, unknown)
            self._keep(START)
        return self.progress

    def _keep(self, epoch: int) -> None:
        self.progress.best_epoch = epoch
        self.progress.best = {key: value.detach().cpu().clone() for key, value in self.module.state_dict().items()}

    def _validate(self) -> Score:
        if self.val_view is None:
            return Score(math.nan, math.nan)
        return evaluate(self.backbone, self.module, self.val_view, self.inputs, self.world)

    def _epoch(self, epoch: int, on_batch: OnBatch) -> EpochRecord:
        # Dropout is drawn anew from (seed, epoch, rank), so that a resumed run draws the same.
        torch.manual_seed((self.recipe.seed * 100_003 + epoch) * 1_009 + self.world.rank)
        self._set_rate(epoch)
        self.train_view.epoch = epoch
        self.module.train()
        self.module.anneal(epoch / max(1, self.recipe.epochs - 1))
        batches = shuffled_batches(len(self.train_view), self.recipe.batch_size, self.recipe.seed, epoch)
        shares = [self.world.share(batch) for batch in batches]
        started = time.perf_counter()
        totals = torch.zeros(3, dtype=torch.float64)
        # A process whose share of the last batch is empty still takes part in the sum of gradients.
        loader = self.inputs.batches(self.train_view, [share for share in shares if share])
        for step, (batch, share) in enumerate(zip(batches, shares, strict=True)):
            data = next(loader) if share else None
            if self.recipe.schedule != "epoch":
                self._set_rate(epoch + step / len(batches))
            totals += self._step(data, len(batch))
            if not torch.isfinite(totals[0]):
                raise DataError(f"the loss is not finite in epoch {epoch}: lower --lr (now {self.recipe.lr:g})")
            seen = max(1.0, float(totals[2]))
            on_batch(epoch, float(totals[0]) / seen, float(totals[1]) / seen, len(batch))
        loss, correct, count = self.world.sum(totals.to(self.backbone.device)).tolist()
        seconds = time.perf_counter() - started
        val = self._validate()
        rate = learning_rate(self.recipe, epoch)
        nmi = None if self.nmi is None else self.nmi()
        return EpochRecord(epoch, rate, loss / count, correct / count, val.loss, val.accuracy, count / seconds, nmi)

    def batch_loss(self, data: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of a training batch, and how many of its images are classified right."""
        return _loss(self.backbone, self.module, data, self.train_view.preprocess)

    def _set_rate(self, epoch: float) -> None:
        rate = learning_rate(self.recipe, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]

    def _step(self, data: Batch | None, batch_size: int) -> Tensor:
        """One optimizer step; returns (sum of losses, correct, images) of this process's share."""
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(3, dtype=torch.float64)
        if data is not None:
            loss, correct = self.batch_loss(data)
            # Divided by the whole batch: the sum over processes is the gradient of the batch's mean loss.
            (loss / batch_size).backward()  # type: ignore[no-untyped-call]
            totals = torch.tensor([loss.item(), correct.item(), len(data[1])]).double()
        self.world.sum_gradients(self.module.parameters())
        self.optimizer.step()
        self.module.clamp()
        return totals

    def state(self) -> dict[str, Any]:
        """Tensors and plain data from which `restore` continues."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.progress.epoch,
            "best_epoch": self.progress.best_epoch,
            "best": self.progress.best,
            "history": [asdict(record) for record in self.progress.history],
            "start": None if self.progress.start is None else asdict(self.progress.start),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        history = [EpochRecord(**record) for record in state["history"]]
        start = None if state["start"] is None else EpochRecord(**state["start"])
        self.progress = Progress(state["epoch"], state["best_epoch"], state["best"], history, start)


def _optimizer(module: TaskModule, recipe: Recipe) -> torch.optim.Optimizer:
    """Three groups: the head, shifts, everything else that steers the backbone; ``scale`` multiplies the rate."""
    decay = recipe.weight_decay if recipe.head_weight_decay is None else recipe.head_weight_decay
    groups = [{"params": module.head_parameters(), "scale": recipe.head_lr_scale, "weight_decay": decay}]
    shifts = [value for name, value in module.named_parameters() if name == "shift"]
    if shifts:
        groups.append({"params": shifts, "scale": SHIFT_SCALE})
    if steering := [value for value in module.steering() if all(value is not shift for shift in shifts)]:
        groups.append({"params": steering, "scale": 1.0})
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def forward_logits(backbone: Backbone, module: TaskModule, images: Tensor | Trunk, preprocess: Preprocess) -> Tensor:
    """uint8 (B, 3, H, W) or their `Trunk`, on the backbone's device, to float32 logits (B, C); bf16 on CUDA."""
    with autocast(backbone):
        logits: Tensor = module(backbone.model, prepared_for(images, preprocess))
    return logits.float()


@torch.no_grad()
def features_of(
    backbone: Backbone, module: TaskModule, view: View, inputs: Inputs, on_image: Callable[[], object]
) -> Iterator[Tensor]:
    """float32 features (B, D) of all images of a split, in order, as evaluation sees them."""
    module.eval()
    for images, targets in inputs.batches(view, ordered_batches(len(view), EVAL_BATCH)):
        with autocast(backbone):
            features = module.features(backbone.model, prepared_for(images.to(backbone.device), view.preprocess))
        for _ in targets:
            on_image()
        yield features.float()


def prepared_for(images: Tensor | Trunk, preprocess: Preprocess) -> Tensor | Trunk:
    """What a `TaskModule` takes."""
    return images if isinstance(images, Trunk) else normalized(images, preprocess)


def _loss(backbone: Backbone, module: TaskModule, data: Batch, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Summed loss of a batch, and how many of its images are right, see `objective`."""
    images, targets = data[0].to(backbone.device), data[1].to(backbone.device, non_blocking=True)
    logits = forward_logits(backbone, module, images, preprocess)
    return loss_sum(logits, targets), right_sum(logits, targets)


@torch.no_grad()
def evaluate(backbone: Backbone, module: TaskModule, view: View, inputs: Inputs, world: World = ALONE) -> Score:
    """Accuracy and mean loss of a whole split, over all processes."""
    module.eval()
    batches = [world.share(batch) for batch in ordered_batches(len(view), EVAL_BATCH)]
    totals = torch.zeros(3, dtype=torch.float64)
    for data in inputs.batches(view, [batch for batch in batches if batch]):
        loss, correct = _loss(backbone, module, data, view.preprocess)
        totals += torch.tensor([loss.item(), correct.item(), len(data[1])]).double()
    loss_sum, correct_sum, count = world.sum(totals.to(backbone.device)).tolist()
    return Score(correct_sum / count, loss_sum / count)
