"""A task is trained, replaced and removed while clients keep sending."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.specs import BackboneSpec
from tests.factories import make_adapter, remove_adapter
from tests.serve.harness import ServerProcess, until


class Sender(threading.Thread):
    """Sends one request after another and keeps (start, end, status, body) of each."""

    def __init__(self, url: str, task: str, image: bytes) -> None:
        super().__init__()
        self.url, self.task, self.image = url, task, image
        self.stopped = threading.Event()
        self.results: list[tuple[float, float, int, dict[str, object]]] = []

    def run(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self.stopped.is_set():
                start = time.monotonic()
                response = client.post(
                    f"{self.url}/predict", data={"task": self.task}, files={"image": ("x", self.image)}
                )
                self.results.append((start, time.monotonic(), response.status_code, response.json()))


@pytest.fixture
def sending(server: ServerProcess, image: bytes) -> Iterator[dict[str, Sender]]:
    """Two clients of the task that changes, one of another task."""
    senders = {name: Sender(server.url, task, image) for name, task in (("a", "swap"), ("b", "swap"), ("c", "birds"))}
    for sender in senders.values():
        sender.start()
    yield senders
    for sender in senders.values():
        sender.stopped.set()
        sender.join()


def test_no_request_is_lost_or_answered_by_a_wrong_revision(
    server: ServerProcess, adapters: Path, spec: BackboneSpec, sending: dict[str, Sender]
) -> None:
    store = AdapterStore(adapters)
    versions = [make_adapter(spec, "swap", seed=100 + i, labels=[f"v{i}-{c}" for c in range(4)]) for i in range(4)]
    labels: dict[str, str] = {}  # revision -> prefix of its labels
    changes: list[tuple[float, float, str | None]] = []  # begun, done, revision or None for removed

    def change(version: int | None) -> None:
        begun = time.monotonic()
        revision = None
        if version is None:
            remove_adapter(store, "swap")
        else:
            revision = store.publish(versions[version])
            labels[revision] = f"v{version}-"
        changes.append((begun, time.monotonic(), revision))
        answered()

    def answered() -> None:
        """Wait for answers to requests that began after the last change."""
        since = time.monotonic()
        for sender in sending.values():
            until(lambda sender=sender: sum(start > since for start, *_ in sender.results) >= 5, 60)

    answered()
    for version in (0, 1, 2, 0, None, 3, None, 1):
        change(version)
    for sender in sending.values():
        sender.stopped.set()
        sender.join()

    assert [line for line in server.log if "engine: onnxruntime" in line]
    assert {status for *_, status, _ in sending["c"].results} == {200}
    seen: set[str | None] = set()
    for start, end, status, body in sending["a"].results + sending["b"].results:
        assert status in (200, 404), body
        revision = body["revision"] if status == 200 else None
        if revision is not None:
            assert all(entry["label"].startswith(labels[revision]) for entry in body["predictions"])
        # What was in force at some moment of the request: the last change done before it, or any begun during it.
        before = [rev for _, done, rev in changes if done <= start][-1:] or [None]
        during = [rev for begun, done, rev in changes if begun <= end and done > start]
        assert revision in before + during
        seen.add(revision)
    assert seen == {None, *labels}
    remove_adapter(store, "swap")
