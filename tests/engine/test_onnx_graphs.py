"""Serving graphs: built once, kept, and never believed without a look."""

import errno
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

from gpt_serve.engine import onnx as cache
from gpt_serve.engine.onnx import file_name, serving_graph
from gpt_serve.errors import ExportError
from gpt_serve.export import files, graphs
from gpt_serve.export.session import Graph
from gpt_serve.files import cache_folder
from gpt_serve.model.backbone import Backbone
from tests.tiny_vit import tiny_backbone

Built = list[str]


@pytest.fixture
def original(tiny: Backbone, tiny_graph: Graph) -> Path:
    """The file of `tiny_graph`."""
    return cache_folder() / file_name(tiny.spec)


@pytest.fixture
def built(original: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    """The names of backbones that graphs were built of: copies of ``original``, so that it takes no time."""
    names: Built = []

    def build(backbone: Backbone, *_: Any) -> ir.Model:
        names.append(backbone.name)
        return ir.load(original)

    monkeypatch.setattr(graphs, "features_graph", build)
    return names


def kept(folder: Path) -> list[str]:
    """What lies there, but for the lock."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_a_graph_is_kept_and_used_again(tiny: Backbone, built: Built, tmp_path: Path) -> None:
    for _ in range(2):
        graph = serving_graph(tiny, folder=tmp_path / "new")
        assert graph.metadata["kind"] == "serving" and graph.metadata["backbone_sha256"] == tiny.fingerprint
        assert kept(tmp_path / "new") == [file_name(tiny.spec)]
    assert built == ["tiny"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scale_a_weight(path: Path) -> None:
    model = onnx.load(path)
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = 1.5 * onnx.numpy_helper.to_array(weights)
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(model, path)


def rename_an_input(path: Path) -> None:
    model = onnx.load(path)
    for value in model.graph.input:
        value.name = value.name.replace("counts", "count")
    for node in model.graph.node:
        node.input[:] = [name.replace("counts", "count") if name == "counts" else name for name in node.input]
    onnx.save(model, path)


def forget_the_metadata(path: Path) -> None:
    files.set_metadata(path, {})


@pytest.mark.parametrize("damage", [cut, empty, scale_a_weight, rename_an_input, forget_the_metadata])
def test_a_damaged_or_outdated_graph_is_built_again(
    tiny: Backbone,
    original: Path,
    built: Built,
    tmp_path: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / original.name
    path.write_bytes(original.read_bytes())
    damage(path)
    serving_graph(tiny, folder=tmp_path)
    assert built == ["tiny"] and "damaged or outdated" in caplog.text
    serving_graph(tiny, folder=tmp_path)
    assert built == ["tiny"]
    assert kept(tmp_path) == [path.name]


def test_a_graph_that_answers_otherwise_is_refused_and_not_kept(original: Path, built: Built, tmp_path: Path) -> None:
    other = tiny_backbone()
    with torch.no_grad():
        other.model.pos_embed.mul_(2)
    with pytest.raises(ExportError, match="does not answer as torch does .* --engine torch"):
        serving_graph(other, folder=tmp_path)
    assert not kept(tmp_path)


def test_what_a_killed_process_left_unfinished_is_removed(tiny: Backbone, built: Built, tmp_path: Path) -> None:
    (tmp_path / ".new-killed").mkdir()
    (tmp_path / ".new-killed" / "graph.onnx").write_bytes(b"half")
    serving_graph(tiny, folder=tmp_path)
    assert not list(tmp_path.glob(".new-*"))


@pytest.mark.parametrize("trouble", ["no folder", "no home", "full"])
def test_without_a_place_to_keep_it_the_graph_is_built_all_the_same(
    tiny: Backbone,
    built: Built,
    tmp_path: Path,
    trouble: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", "nowhere" if trouble == "no home" else str(tmp_path / "file"))
    save = files.save

    def refuse(model: ir.Model, path: Path, *others: Any) -> None:
        if (tmp_path / "temporary") not in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(model, path, *others)

    monkeypatch.setattr(files, "save", refuse)
    graph = serving_graph(tiny, folder=tmp_path / "kept" if trouble == "full" else None)
    assert graph.metadata["kind"] == "serving" and len(built) == (2 if trouble == "full" else 1)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "is built at every start" in warning.message and "None" not in warning.message
    assert not list((tmp_path / "temporary").iterdir())
    assert trouble != "full" or not kept(tmp_path / "kept")


def test_two_that_start_at_once_build_one(tiny: Backbone, built: Built, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        for graph in pool.map(lambda _: serving_graph(tiny, folder=tmp_path), range(2)):
            assert graph.metadata["kind"] == "serving"
    assert kept(tmp_path) == [file_name(tiny.spec)] and built == ["tiny"]


def test_the_name_says_what_a_graph_was_made_from(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny.spec
    larger = replace(spec, preprocess=replace(spec.preprocess, input_size=(16, 32)))
    names = {file_name(spec), file_name(larger), file_name(replace(spec, fingerprint="cd" * 32))}
    monkeypatch.setattr(cache.ort, "__version__", "9.9")
    names.add(file_name(spec))
    monkeypatch.setattr(cache, "__version__", "9.9")
    names.add(file_name(spec))
    assert len(names) == 5 and not any("/" in name for name in names)


def test_the_folder_is_where_caches_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/gpt-serve")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/gpt-serve")
