"""Adapters on the Hugging Face hub: one repository, a folder for each task, and a card by the hub's conventions."""

from collections.abc import Mapping
from typing import Any

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.bucket import DIGEST_NAME, Bucket, digest_line, reaching
from gpt_serve.adapters.source import FILE_NAME

LIBRARY = "gpt-serve"


def push_to_hub(bucket: Bucket, adapter: Adapter, files: Mapping[str, bytes]) -> None:
    """Everything in one commit, so that nobody sees a part of it; the repository is made if need be.

    Args:
        files: by name, the adapter among them.

    Raises:
        OSError: the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    repository = bucket.address.removeprefix("hf://").partition("@")[0]
    files = {**files, DIGEST_NAME: digest_line(files[FILE_NAME])}
    additions = [CommitOperationAdd(f"{adapter.task}/{name}", data) for name, data in files.items()]
    api = HfApi()
    with reaching(bucket.address):
        api.create_repo(repository, exist_ok=True)
    card = hub_card(repository, sorted({*bucket.list(), adapter.task}), adapter)
    additions.append(CommitOperationAdd("README.md", card.encode()))
    with reaching(bucket.address):
        api.create_commit(repository, additions, commit_message=f"Adapter {adapter.task}")


def hub_card(repository: str, tasks: list[str], adapter: Adapter) -> str:
    """The repository's README: metadata that the hub indexes, and how to use what is there.

    Args:
        tasks: all that the repository holds.
        adapter: the latest; its backbone is the base model.
    """
    from huggingface_hub import ModelCardData

    metadata: dict[str, Any] = {
        "library_name": LIBRARY,
        "pipeline_tag": "image-classification",
        "tags": ["vision-transformer", "prompt-tuning", "gated-prompt-tuning"],
    }
    base = hub_name(adapter.backbone)
    if base is not None:
        metadata |= {"base_model": base, "base_model_relation": "adapter"}
    lines = [
        f"---\n{ModelCardData(**metadata).to_yaml()}\n---",
        f"# {repository.rpartition('/')[2]}",
        "",
        f"Adapters of GPT-Serve for the frozen backbone `{adapter.backbone}` (weights "
        f"`{adapter.backbone_sha256[:12]}`):",
        "",
        *[f"- [{task}]({task}/README.md)" for task in tasks],
        "",
        "```bash",
        f"gpt-serve serve --backbone {adapter.backbone} --adapters hf://{repository}",
        f"gpt-serve pull --task {adapter.task} hf://{repository}",
        "```",
        "",
    ]
    return "\n".join(lines)


def hub_name(backbone: str) -> str | None:
    """The backbone's repository on the hub, as timm knows it; None for the bundled one, which has none."""
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(backbone)
    return None if config is None else config.hf_hub_id
