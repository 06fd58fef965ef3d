"""What a finished run leaves: a published adapter with its card, or a fine-tuned model."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import DataError, InvalidAdapter, UsageError
from gpt_serve.files import replacing
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import Preprocess
from gpt_serve.train.card import write_card
from gpt_serve.train.conclusion import Conclusion
from gpt_serve.train.job import TrainingJob, Views
from gpt_serve.train.loop import Progress
from gpt_serve.train.methods.modules import FullModule, TaskModule
from gpt_serve.train.methods.prompts import AdapterModule

OTHER_BYTES = 2**16  # room in an adapter's metadata for digests, metrics and what closing gates records


def rehearse(
    backbone: Backbone, job: TrainingJob, labels: tuple[str, ...], module: AdapterModule, preprocess: Preprocess
) -> None:
    """Make the file that training would publish, of an untrained module.

    A limit of the format is so met before anything trains, not when all is done.

    Raises:
        DataError: the file cannot hold it, such as the names of too many classes.
    """
    training = {
        "recipe": job.recipe.to_dict(),
        "nmi": [[-1 / 3] * backbone.spec.depth] * job.recipe.epochs if job.nmi else [],
        "others": " " * OTHER_BYTES,
    }
    try:
        to_adapter(backbone, job, labels, module, training, preprocess).to_bytes()
    except InvalidAdapter as error:
        what = "fewer prompts, fewer classes or shorter names of them" + (", or no --nmi" if job.nmi else "")
        raise DataError(f"the adapter of {job.task!r} could not be stored: {error}: take {what}") from error


def publish_trained(
    backbone: Backbone,
    job: TrainingJob,
    views: Views,
    module: TaskModule,
    training: dict[str, Any],
    end: Conclusion,
) -> dict[str, Any]:
    """Publish an adapter, or store a fine-tuned model, which nobody serves.

    Args:
        training: from `describe`.
        end: what is known of the module now that it is done.

    Returns:
        The summary that ``--json`` prints.
    """
    summary = {"task": job.task, "method": job.recipe.method, "backbone": backbone.name, **training}
    if isinstance(module, FullModule):
        path = job.adapters / ".full" / f"{job.task}.safetensors"
        store_model(path, module, views.labels, summary)
        return summary | {"path": str(path)}
    assert isinstance(module, AdapterModule)
    adapter = to_adapter(backbone, job, views.labels, module, training, views.train.preprocess)
    return summary | {"revision": publish(job.adapters, adapter, end)}


def store_model(path: Path, module: FullModule, labels: tuple[str, ...], summary: dict[str, Any]) -> None:
    """Write the weights by timm's names, with labels and summary as JSON in the metadata; a crash leaves the old file.

    Raises:
        UsageError: the disk refuses.
    """
    metadata = {"labels": json.dumps(labels, ensure_ascii=False), "training": json.dumps(summary)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(module.weights(), temporary, metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"the fine-tuned model {path} cannot be written: {reason}") from error


def publish(adapters: Path, adapter: Adapter, end: Conclusion) -> str:
    """Put the adapter into the store and write its card.

    Returns:
        The new revision.

    Raises:
        UsageError: the disk refuses; the message says which of the two.
    """
    revision = AdapterStore(adapters).publish(adapter)
    try:
        write_card(adapters / adapter.task, adapter, revision, end)
    except OSError as error:
        raise UsageError(f"the adapter is published, but its card cannot be written: {error.strerror}") from error
    return revision


def describe(job: TrainingJob, views: Views, module: TaskModule, progress: Progress, seconds: float) -> dict[str, Any]:
    """What the adapter's metadata and card tell about its training."""
    best = progress.best_record
    nmi = {"nmi": [record.nmi for record in progress.history]} if job.nmi else {}
    return nmi | {
        "recipe": job.recipe.to_dict(),
        "data": {
            "source": Path(job.data).name if Path(job.data).exists() else job.data,
            "sha256": views.digest,
            "train": len(views.train),
            "val": len(views.val),
            "test": 0 if views.test is None else len(views.test),
        },
        "metrics": {
            **({} if job.recipe.final_fit else {"val_accuracy": best.val_accuracy, "val_loss": best.val_loss}),
            **({} if math.isnan(best.train_accuracy) else {"train_accuracy": best.train_accuracy}),
            "best_epoch": best.epoch,
            "seconds": round(seconds, 1),
        },
        "trainable_parameters": sum(parameter.numel() for parameter in module.parameters()),
    }


def to_adapter(
    backbone: Backbone,
    job: TrainingJob,
    labels: tuple[str, ...],
    module: AdapterModule,
    training: dict[str, Any],
    preprocess: Preprocess,
) -> Adapter:
    """The module's tensors and the task's own preprocessing as a storable adapter."""
    return Adapter(
        task=job.task,
        method=job.recipe.method,
        backbone=backbone.name,
        backbone_sha256=backbone.fingerprint,
        labels=labels,
        preprocess=preprocess,
        training=training,
        created=utc_now(),
        **module.stored(),
    )


def utc_now() -> str:
    """Return the time now as adapters store it: UTC, ISO 8601, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
