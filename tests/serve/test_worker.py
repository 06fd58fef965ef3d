"""The worker's verbs, in process."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gpt_serve.engine import Prediction
from gpt_serve.errors import UndecodableImage, UnknownTask
from gpt_serve.serve import ServeConfig
from gpt_serve.serve.worker import Item, PredictAPI, WaitingLoop


class Engine:
    """Answers by the task's name and records its batches."""

    bank = ("one resident",)

    def __init__(self, broken: Exception | None = None) -> None:
        self.broken = broken
        self.batches: list[list[str]] = []

    def predict(self, requests: Sequence[tuple[str, bytes]]) -> list[Any]:
        self.batches.append([task for task, _ in requests])
        if self.broken and "broken" in self.batches[-1]:
            raise self.broken
        errors = {"unknown": UnknownTask("no such task"), "bad": UndecodableImage("damaged")}
        good = Prediction("good", "0123456789ab", ("a", "b"), torch.tensor([0.25, 0.75]))
        return [errors.get(task, good) for task, _ in requests]


def api(engine: Engine) -> PredictAPI:
    made = PredictAPI(ServeConfig())
    made.engine = engine  # type: ignore[assignment]
    return made


def item(task: str, top_k: int = 5, *, seconds: float = 10) -> Item:
    return (task, b"image", top_k, time.monotonic() + seconds)


def test_errors_are_values_and_only_the_first_reply_carries_numbers() -> None:
    replies = api(Engine()).predict([item("unknown"), item("good", 1), item("bad"), item("good")])
    assert [(kind, value) for kind, value, _ in replies] == [
        ("UnknownTask", "no such task"),
        ("", {"task": "good", "revision": "0123456789ab", "predictions": [{"label": "b", "probability": 0.75}]}),
        ("UndecodableImage", "damaged"),
        (
            "",
            {
                "task": "good",
                "revision": "0123456789ab",
                "predictions": [{"label": "b", "probability": 0.75}, {"label": "a", "probability": 0.25}],
            },
        ),
    ]
    numbers = replies[0][2]
    assert numbers is not None and numbers[0] == 4 and numbers[1] >= 0 and numbers[2] == 1
    assert [numbers for *_, numbers in replies[1:]] == [None] * 3


def test_expired_requests_are_not_computed() -> None:
    engine = Engine()
    replies = api(engine).predict([item("good", seconds=-1), item("good"), item("good", seconds=-1)])
    assert [kind for kind, *_ in replies] == ["DeadlineExceeded", "", "DeadlineExceeded"]
    assert engine.batches == [["good"]]
    assert [kind for kind, *_ in api(engine).predict([item("good", seconds=-1)])] == ["DeadlineExceeded"]
    assert engine.batches == [["good"]]


def test_a_batch_that_breaks_the_engine_is_taken_apart(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(RuntimeError("a bug"))
    replies = api(engine).predict([item("good"), item("broken"), item("good")])
    assert [kind for kind, *_ in replies] == ["", "GPTServeError", ""]
    assert engine.batches == [["good", "broken", "good"], ["good"], ["broken"], ["good"]]


class Ended(BaseException):
    """Instead of the end of this process."""


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        assert code != 0
        raise Ended

    monkeypatch.setattr("os._exit", end)


def test_a_lost_device_ends_the_worker(ending: None) -> None:
    with pytest.raises(Ended):
        api(Engine(torch.AcceleratorError("illegal memory access"))).predict([item("broken"), item("good")])


CUDA_FAILURE = "[ONNXRuntimeError] : 1 : FAIL : CUDA failure {}: what happened ; GPU=0 ; hostname=here"


def test_onnxruntime_loses_a_device_too_but_not_by_running_out_of_memory(ending: None) -> None:
    with pytest.raises(Ended):
        api(Engine(RuntimeError(CUDA_FAILURE.format(700)))).predict([item("broken"), item("good")])
    replies = api(Engine(RuntimeError(CUDA_FAILURE.format(2)))).predict([item("broken"), item("good")])
    assert [kind for kind, *_ in replies] == ["GPTServeError", ""]


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(), BrokenPipeError()])
def test_a_worker_without_its_queue_ends(ending: None, error: Exception) -> None:
    class Gone:
        def get(self, timeout: float) -> None:
            raise error

    with pytest.raises(Ended):
        WaitingLoop().get_batch_requests(api(Engine()), Gone(), None)
