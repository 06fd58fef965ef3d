"""The desk: what is counted, and what asking for the counts may cost."""

import asyncio
import threading
from pathlib import Path

import pytest

from gpt_serve.errors import NotReady, Overloaded
from gpt_serve.serve import ServeConfig
from gpt_serve.serve.desk import LocalDesk
from gpt_serve.serve.gate import Gate
from gpt_serve.serve.messages import Answer, Format, Item
from gpt_serve.serve.metrics import Metrics
from gpt_serve.serve.state import ServerState


class Never:
    """Keeps what it is asked, and never answers."""

    def __init__(self) -> None:
        self.futures: list[asyncio.Future[Answer]] = []

    def ask(self, item: Item) -> "asyncio.Future[Answer]":
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]


def item(task: str, tenant: str = "") -> Item:
    return Item(task, b"x", Format(), 0.0, tenant)


async def turns() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


def test_who_asks_for_metrics_while_they_are_made_shares_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred that ask at once cost two texts, and each sees all that was counted before it asked."""
    state = ServerState(8, phase="ready")
    metrics, made, going = Metrics(state), list[str](), threading.Event()
    text = metrics.text

    def slowly() -> bytes:
        going.wait(20)
        made.append("text")
        return text()

    monkeypatch.setattr(metrics, "text", slowly)

    async def main() -> None:
        desk = LocalDesk(ServeConfig(adapters=tmp_path), Never(), state, metrics)
        first = asyncio.ensure_future(desk.exposition())
        await asyncio.sleep(0.05)
        desk.answered("/health", "", 200, [], 0.0)
        others = [asyncio.ensure_future(desk.exposition()) for _ in range(100)]
        await asyncio.sleep(0)
        going.set()
        await first
        texts = await asyncio.gather(*others)
        assert made == ["text"] * 2
        assert all(b'gpt_serve_answers_total{route="/health",status="200"} 1.0' in one for one in texts)

    asyncio.run(main())


def test_a_slot_is_held_until_its_answer_or_until_nobody_waits() -> None:
    async def main() -> None:
        state, asks = ServerState(2, phase="ready"), Never()
        gate = Gate(asks, state)
        answered, left = gate.ask(item("a")), gate.ask(item("b"))
        assert state.admitted == 2
        asks.futures[0].set_result(Answer("a", "0123456789ab", b"{}"))
        left.cancel()
        await turns()
        assert answered.result().task == "a" and state.admitted == 0 and asks.futures[1].cancelled()

    asyncio.run(main())


def test_a_displaced_item_is_told_so_and_its_work_spared() -> None:
    async def main() -> None:
        state, asks = ServerState(2, phase="ready"), Never()
        gate = Gate(asks, state)
        noisy = [gate.ask(item("a", "noisy")) for _ in range(2)]
        quiet = gate.ask(item("a", "quiet"))
        await turns()
        assert isinstance(noisy[1].exception(), Overloaded) and asks.futures[1].cancelled()
        assert not noisy[0].done() and not quiet.done() and state.admitted == 2
        state.draining = True
        assert isinstance(gate.ask(item("a")).exception(), NotReady)

    asyncio.run(main())
