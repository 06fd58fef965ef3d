import pytest

from gpt_serve.errors import UsageError
from gpt_serve.serve import ServeConfig


@pytest.mark.parametrize(
    ("device", "engine", "chosen"),
    [
        ("cpu", "auto", "onnx"),
        ("cuda", "auto", "torch"),
        ("cuda:1", "auto", "torch"),
        ("mps", "auto", "torch"),
        ("cpu", "torch", "torch"),
        ("cuda:1", "onnx", "onnx"),
    ],
)
def test_engine(device: str, engine: str, chosen: str) -> None:
    assert ServeConfig(device=device, engine=engine).chosen_engine == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize(("device", "engine"), [("cpu", "tensorflow"), ("mps", "onnx")])
def test_engines_that_there_are_not(device: str, engine: str) -> None:
    with pytest.raises(UsageError, match="use .*torch"):
        ServeConfig(device=device, engine=engine)  # type: ignore[arg-type]
