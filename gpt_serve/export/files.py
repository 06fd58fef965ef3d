"""Graphs on disk: metadata, external weights, int8, and all or nothing."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from gpt_serve.errors import ExportError

EXTERNAL_BYTES = 2**31 - 2**26  # protobuf ends at 2 GiB; the rest is for everything but the weights
SUFFIX = ".onnx"
DATA_SUFFIX = ".data"
BANK_SUFFIX = ".bank"


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A new folder beside ``output``; what was written there is moved into place at the end, and only then.

    Raises:
        ExportError: the folder cannot be written to.
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
    """Move weights, then the bank, then the graph that refers to them."""
    data = output.with_name(output.name + DATA_SUFFIX)
    if (folder / data.name).exists():
        os.replace(folder / data.name, data)
    else:
        data.unlink(missing_ok=True)  # of an earlier export to this name
    bank = bank_folder(output)
    if (folder / bank.name).exists():
        shutil.rmtree(bank, ignore_errors=True)
        os.replace(folder / bank.name, bank)
    os.replace(folder / output.name, output)


def bank_folder(graph: Path) -> Path:
    """Where the tasks of a multi-task graph lie."""
    return graph.with_suffix(BANK_SUFFIX)


def save(model: ir.Model, path: Path, metadata: Mapping[str, str], external_bytes: int = EXTERNAL_BYTES) -> None:
    """Write the graph; weights of more than ``external_bytes`` in all go to ``<name>.data`` beside it."""
    model.metadata_props.update(metadata)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}{DATA_SUFFIX}" if weights > external_bytes else None
    ir.save(model, path, external_data=external)


def count_nodes(path: Path) -> int:
    """Operators in the graph."""
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
