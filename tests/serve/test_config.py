from typing import Any

import click
import pytest

from gpt_serve.cli.options import ByteSize
from gpt_serve.engine.bank import DEFAULT_BANK_BYTES, DEFAULT_HOST_BYTES
from gpt_serve.errors import UsageError
from gpt_serve.serve import ServeConfig


@pytest.mark.parametrize(
    ("device", "engine", "chosen"),
    [
        ("cpu", "auto", "onnx"),
        ("cuda", "auto", "torch"),
        ("cuda:1", "auto", "torch"),
        ("cpu", "torch", "torch"),
        ("cuda:1", "onnx", "onnx"),
    ],
)
def test_engine(device: str, engine: str, chosen: str) -> None:
    assert ServeConfig(device=device, engine=engine).chosen_engine == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"precision": "bf16"}, {"compile": True}], ids=str)
def test_what_only_torch_can_do(option: dict[str, Any]) -> None:
    assert ServeConfig(**option).chosen_engine == "torch"
    with pytest.raises(UsageError, match="use --engine torch or auto"):
        ServeConfig(engine="onnx", **option)


def test_a_precision_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="use fp32 or bf16"):
        ServeConfig(precision="fp8")  # type: ignore[arg-type]


def test_an_engine_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="use .*torch"):
        ServeConfig(engine="tensorflow")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["mps", "cuda:x", "cpux"])
def test_a_device_that_there_is_not(device: str) -> None:
    with pytest.raises(UsageError, match="use cpu, cuda or cuda:<index>$"):
        ServeConfig(device=device)


def test_default_sizes_are_the_banks_own() -> None:
    assert (ServeConfig().bank_bytes, ServeConfig().host_bytes) == (DEFAULT_BANK_BYTES, DEFAULT_HOST_BYTES)


@pytest.mark.parametrize(
    "options",
    [{"bank_bytes": 0}, {"host_bytes": -1}, {"trunk_cache_bytes": -1}, {"batch_timeout": -0.1}, {"queue_limit": 0}],
)
def test_numbers_that_cannot_work(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"^{name} is"):
        ServeConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("proxies", ["localhost", "10.0.0.0/40", "127.0.0.1,proxy"])
def test_proxies_are_addresses(proxies: str) -> None:
    assert ServeConfig(trusted_proxies="127.0.0.1, 10.0.0.0/8,::1").trusted_proxies and ServeConfig(trusted_proxies="*")
    with pytest.raises(UsageError, match="is no address: give one such as"):
        ServeConfig(trusted_proxies=proxies)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 2**20), ("1M", 2**20), ("1024k", 2**20), ("0.5G", 2**29), ("2GiB", 2**31), ("3TB", 3 * 2**40)],
)
def test_sizes(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "-1", "1e9", "M", "12Q", "1.M", "one"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        ByteSize().convert(text, None, None)
