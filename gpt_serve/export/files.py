"""Graphs on disk: metadata, external weights, int8, and all or nothing."""

import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from gpt_serve.errors import ExportError

EXTERNAL_BYTES = 2**31 - 2**26  # protobuf ends at 2 GiB; the rest is for everything but the weights
SUFFIX = ".onnx"
DATA_SUFFIX = ".data"
BANK_SUFFIX = ".bank"
BANK_KEY = "bank"  # of a graph's metadata: the name of the folder beside it that holds its tasks


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Give a new folder beside ``output`` to write an export to; at the end all of it takes ``output``'s place.

    The folder holds the graph, and beside it its weights (``<graph>.data``) and its bank (``<stem>.bank``) if it has
    any. Nothing of it is seen before the end, and nothing is left of it after a failure; see `publish`.

    Raises:
        ExportError: the folder or its place cannot be written to.
    """
    if output.suffix != SUFFIX:
        raise ExportError(f"--output {output}: the name of a graph ends in {SUFFIX}")
    if output.is_dir():
        raise ExportError(f"--output {output} is a folder: name a file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.stem}-", dir=output.parent))
    except OSError as error:
        raise ExportError(f"--output {output} cannot be written: {error.strerror}") from error
    try:
        yield folder
        publish(folder, output)
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, output: Path) -> None:
    """Move the graph ``folder / output.name`` and what belongs to it beside and over ``output``, by one rename.

    Weights and bank get names of their own, which no other export has, and the graph says which are its own. So they
    can lie beside an earlier export's, and the rename of the graph switches everything at once: who opens ``output``,
    at any time and after a crash at any point, finds the earlier export or this one, whole. What the earlier one left
    is removed last. Who opened the earlier graph and looks for its weights only now finds none: an error, never a
    mixture, and opening ``output`` again gives the new export. A crash can leave files that nothing refers to.

    Raises:
        OSError: the disk refuses; ``output`` is as it was, unless only the removal failed.
    """
    companions = _name_companions(folder / output.name)
    replaced = _companions(output)
    moved = []
    try:
        for name in companions:
            os.replace(folder / name, output.with_name(name))
            moved.append(output.with_name(name))
        os.replace(folder / output.name, output)
    except BaseException:
        _remove(moved)
        raise
    _remove(replaced)


def bank_folder(graph: Path, metadata: Mapping[str, str]) -> Path:
    """Return where the tasks of a multi-task graph lie; graphs of earlier versions do not say so."""
    return graph.with_name(Path(metadata.get(BANK_KEY, f"{graph.stem}{BANK_SUFFIX}")).name)


def _name_companions(graph: Path) -> list[str]:
    """Rename the weights and the bank beside a staged graph to names of their own; return these names."""
    token = secrets.token_hex(4)
    names = {
        f"{graph.name}{DATA_SUFFIX}": f"{graph.stem}.{token}{SUFFIX}{DATA_SUFFIX}",
        f"{graph.stem}{BANK_SUFFIX}": f"{graph.stem}.{token}{BANK_SUFFIX}",
    }
    names = {plain: own for plain, own in names.items() if (graph.parent / plain).exists()}
    if names:
        model = onnx.load(graph, load_external_data=False)
        for entry in _locations(model):
            entry.value = names[entry.value]
        if (bank := names.get(f"{graph.stem}{BANK_SUFFIX}")) is not None:
            onnx.helper.set_model_props(model, _metadata(model) | {BANK_KEY: bank})
        onnx.save(model, graph)
    for plain, own in names.items():
        (graph.parent / plain).rename(graph.parent / own)
    return list(names.values())


def _companions(graph: Path) -> list[Path]:
    """Return what belongs to the export at ``graph`` beside it; nothing where there is none, or another's file."""
    try:
        model = onnx.load(graph, load_external_data=False)
    except (FileNotFoundError, DecodeError):
        return []
    metadata = _metadata(model)
    named = {entry.value for entry in _locations(model)}
    if metadata.get("kind") == "multi":
        named.add(bank_folder(graph, metadata).name)
    ours = re.compile(rf"{re.escape(graph.stem)}(\.[0-9a-f]{{8}})?({SUFFIX}{DATA_SUFFIX}|{BANK_SUFFIX})")
    return [graph.with_name(name) for name in named if ours.fullmatch(name)]


def _locations(model: onnx.ModelProto) -> Iterator[onnx.StringStringEntryProto]:
    """Yield where the graph says that its external weights lie, once for each tensor."""
    for tensor in model.graph.initializer:
        yield from (entry for entry in tensor.external_data if entry.key == "location")


def _metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def save(model: ir.Model, path: Path, metadata: Mapping[str, str], external_bytes: int = EXTERNAL_BYTES) -> None:
    """Write the graph; weights of more than ``external_bytes`` in all go to ``<name>.data`` beside it."""
    model.metadata_props.update(metadata)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}{DATA_SUFFIX}" if weights > external_bytes else None
    ir.save(model, path, external_data=external)


def count_nodes(path: Path) -> int:
    """Return the number of operators in the graph at ``path``."""
    return len(onnx.load(path, load_external_data=False).graph.node)


def set_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Replace the graph's metadata; external weights stay where they are."""
    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)


def quantize(path: Path, external_bytes: int = EXTERNAL_BYTES) -> None:
    """Turn the graph's matrix products into int8 ones, but for the head: it is small and decides.

    Weights are scaled per output channel, activations over the whole batch as it comes.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # takes a second

    external = path.with_name(path.name + DATA_SUFFIX)
    model = onnx.load(path)
    external.unlink(missing_ok=True)
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    del model.graph.value_info[:]  # the exporter's shapes confuse the quantizer
    heads = [f"{node.name}_MatMul" for node in model.graph.node if node.op_type == "Gemm"]  # as the quantizer names it
    logging.disable(logging.WARNING)  # it recommends what has been done
    try:
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=heads,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=weights > external_bytes,
        )
    finally:
        logging.disable(logging.NOTSET)
