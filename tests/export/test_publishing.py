"""An export takes its place all at once: interrupted at any step, and under the eyes of a reader."""

import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from gpt_serve.export.files import publish
from tests.export.stand_in import multi
from tests.factories import TINY_SPEC, make_adapter

sys.path.insert(0, str(Path(__file__).parents[2] / "export"))
import run  # noqa: E402

SIDES = {"old": 16, "new": 32}  # of the input, so that neither graph can use the other's weights
TASKS = {"old": ["alpha", "beta"], "new": ["alpha", "gamma"]}


class Crash(BaseException):
    """The process is gone: what would clean up after an error is not run, either."""


def export(version: str, output: Path) -> None:
    """Stage and publish a graph with weights and a bank of its own."""
    size = (SIDES[version], SIDES[version])
    spec = replace(TINY_SPEC, preprocess=replace(TINY_SPEC.preprocess, input_size=size))
    adapters = [make_adapter(spec, task, seed=SIDES[version]) for task in TASKS[version]]
    folder = output.parent / f".staged-{version}"
    folder.mkdir(exist_ok=True)
    multi(folder / output.name, adapters, spec=spec, external=True)
    publish(folder, output)
    folder.rmdir()  # nothing is left in it


def version_of(output: Path) -> str:
    """Which export a reader finds; `run.RunnerError` or this test's assertion if it is a mixture."""
    model = run.Model(output)
    side = model.tasks["alpha"].preprocess["input_size"][0]
    version = next(name for name, own in SIDES.items() if own == side)
    assert list(model.tasks) == TASKS[version]
    return version


@dataclass
class Steps:
    """Calls that change the disk; from number ``last`` on each raises `Crash` instead."""

    last: int
    done: int = 0

    def watch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if self.done >= self.last:
                raise Crash
            self.done += 1
            return call(*arguments, **options)

        return watched


CHANGES = [(os, "replace"), (os, "rename"), (os, "unlink"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree")]


def interrupted(version: str, output: Path, last: int) -> bool:
    """`export` that is killed before its step ``last``; whether it was."""
    steps = Steps(last)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [*CHANGES, (onnx, "save")]:
            patch.setattr(owner, name, steps.watch(getattr(owner, name)))
        try:
            export(version, output)
        except Crash:
            return True
    return False


def test_interrupted_at_any_step_the_old_export_or_the_new_one_is_there(tmp_path: Path) -> None:
    seen = []
    for last in range(3, 100):  # the first steps write the stand-in itself
        output = tmp_path / str(last) / "multi.onnx"
        output.parent.mkdir()
        export("old", output)
        killed = interrupted("new", output, last)
        seen.append(version_of(output))
        if not killed:
            break
    assert not killed
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}
    assert seen.count("new") > 1, "killed while it removed what it had replaced"


def test_an_error_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "multi.onnx"
    export("old", output)
    before = sorted(tmp_path.iterdir())
    real = os.replace

    def refuse(source: Path, target: Path) -> None:
        if target == output:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        export("new", output)
    shutil.rmtree(tmp_path / ".staged-new")
    assert sorted(tmp_path.iterdir()) == before
    assert version_of(output) == "old"


def test_a_reader_always_finds_one_whole_export(tmp_path: Path) -> None:
    output, seen, done = tmp_path / "multi.onnx", set(), threading.Event()
    export("old", output)

    def write() -> None:
        for number in range(30):
            export(("new", "old")[number % 2], output)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        seen.add(version_of(output))
    writer.join()
    assert seen == {"old", "new"}
    assert len(list(tmp_path.iterdir())) == 3, "graph, weights and bank of the last export"


def test_what_belongs_to_others_is_not_removed(tmp_path: Path) -> None:
    """An earlier version's names are ours; a foreign graph's weights, and banks of other names, are not."""
    output = tmp_path / "multi.onnx"
    multi(output, [make_adapter(TINY_SPEC, "alpha")], external=True)
    (tmp_path / "other.bank").mkdir()
    export("new", output)
    assert not (tmp_path / "multi.bank").exists() and not (tmp_path / "multi.onnx.data").exists()
    assert (tmp_path / "other.bank").exists()
    foreign = onnx.load(output, load_external_data=False)
    for tensor in foreign.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../weights.data" if entry.key == "location" else entry.value
    onnx.helper.set_model_props(foreign, {"kind": "multi", "bank": "other.bank"})
    (tmp_path.parent / "weights.data").write_bytes(b"theirs")
    output.write_bytes(foreign.SerializeToString())
    export("old", output)
    assert version_of(output) == "old"
    assert (tmp_path / "other.bank").exists()
    assert (tmp_path.parent / "weights.data").read_bytes() == b"theirs"
    output.write_text("no graph")
    export("new", output)
    assert version_of(output) == "new"
