"""What ``predict`` says of an image: entries for ``--json``, lines for people, mask files."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt_serve.cli.exits import say
from gpt_serve.errors import GPTServeError, UsageError
from gpt_serve.files import replacing

if TYPE_CHECKING:
    from gpt_serve.engine.engine import Answer, Success
    from gpt_serve.engine.segment import Segmentation

SHOWN = 5  # classes of a mask in a line


class Entries:
    """Makes an entry of each image.

    Args:
        tasks: those that are asked; one of them answers in the entry itself, several in a list.
        top_k: most labels of an answer; None for the task's own choice.
        masks: folder for mask files.
    """

    def __init__(self, tasks: Sequence[str], top_k: int | None, masks: Path) -> None:
        self.tasks = tasks
        self.top_k = top_k
        self.masks = masks

    def entry(self, image: Path, outcomes: Sequence["Answer"]) -> dict[str, Any]:
        """What ``--json`` has of an image. Writes the masks among ``outcomes``, of which there is one for each task."""
        answers = [
            {"error": str(outcome)} if isinstance(outcome, GPTServeError) else self._answer(image, outcome)
            for outcome in outcomes
        ]
        if len(answers) == 1:
            return {"image": str(image), **answers[0]}
        named = zip(self.tasks, answers, strict=True)
        return {"image": str(image), "answers": [{"task": task, **answer} for task, answer in named]}

    def check_names(self, images: Iterable[Path], tasks: Sequence[str]) -> None:
        """Raise where two images would write the same file for one of ``tasks``, all of which answer with masks."""
        taken: dict[Path, Path] = {}
        for image in images if tasks else ():
            file = self.file(image, tasks[0])
            if taken.setdefault(file, image) != image:
                raise UsageError(f"{taken[file]} and {image} would both write {file}: ask about one at a time")

    def file(self, image: Path, task: str) -> Path:
        """Where the mask of an image is written."""
        return self.masks / f"{image.stem}.{task}.png"

    def _answer(self, image: Path, outcome: "Success") -> dict[str, Any]:
        from gpt_serve.engine.segment import Segmentation

        if isinstance(outcome, Segmentation):
            answer = self._segmentation(outcome, self.file(image, outcome.task))
        else:
            answer = outcome.to_dict(self.top_k)
        del answer["task"]  # the entry says so already
        return answer

    def _segmentation(self, outcome: "Segmentation", file: Path) -> dict[str, Any]:
        from gpt_serve.images.mask_files import png

        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary:
                temporary.write_bytes(png(outcome.mask))
        except OSError as error:
            raise UsageError(f"--masks {self.masks}: {file} cannot be written: {error.strerror}") from error
        return outcome.to_dict() | {"mask": str(file)}


def show(entry: dict[str, Any], *, errors_only: bool) -> None:
    """A line for each answer in an entry, those without one on stderr."""
    for answer in entry.get("answers", [entry]):
        about = entry["image"] + (f": {answer['task']}" if "task" in answer else "")
        if "error" in answer:
            say(f"{about}: {answer['error']}")
        elif not errors_only:
            click.echo(f"{click.format_filename(about)}: {_line(answer)}")


def _line(answer: dict[str, Any]) -> str:
    if "mask" not in answer:
        stranger = ", probably none of these" if answer.get("unknown") else ""
        return _shares((item["label"], item["probability"]) for item in answer["predictions"]) + stranger
    largest = sorted(answer["classes"], key=lambda item: item["share"], reverse=True)
    shares = _shares((item["label"], item["share"]) for item in largest[:SHOWN] if item["share"] > 0)
    return f"{shares} -> {click.format_filename(answer['mask'])}"


def _shares(items: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{label} {100 * share:.1f} %" for label, share in items)
