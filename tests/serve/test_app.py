"""The routes alone, in front of a stub: what another place that runs the engine has to bring."""

import asyncio
import base64
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from gpt_serve.errors import UndecodableImage
from gpt_serve.serve import ServeConfig
from gpt_serve.serve.app import Door, build_app
from gpt_serve.serve.desk import LocalDesk
from gpt_serve.serve.messages import Answer, Asks, Format, Item
from gpt_serve.serve.metrics import Metrics
from gpt_serve.serve.state import ServerState
from gpt_serve.specs import BackboneSpec


class Stub:
    """Answers with the length of the image, at once; keeps what it was asked."""

    def __init__(self) -> None:
        self.items: list[Item] = []

    def ask(self, item: Item) -> "asyncio.Future[Answer]":
        self.items.append(item)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if item.image == b"bad":
            future.set_exception(UndecodableImage("damaged"))
        else:
            future.set_result(Answer(item.task, "0123456789ab", b'{"bytes":%d}' % len(item.image)))
        return future


def door_to(asks: Asks, config: ServeConfig, spec: BackboneSpec) -> Door:
    """With 8 slots."""
    state = ServerState(8, phase="ready", spec=spec)
    return Door(config, LocalDesk(config, asks, state, Metrics(state)))


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def client(stub: Stub, adapters: Path, spec: BackboneSpec) -> TestClient:
    return TestClient(build_app(door_to(stub, ServeConfig(adapters=adapters), spec)))


def test_the_routes_need_only_someone_to_ask(client: TestClient, stub: Stub) -> None:
    response = client.post("/predict", data={"task": "birds", "top_k": "3"}, files={"image": ("x", b"12345")})
    assert (response.status_code, response.json()) == (200, {"bytes": 5})
    assert replace(stub.items[0], expires=0) == Item("birds", b"12345", Format(3), 0)
    assert client.get("/ready").status_code == client.get("/tasks").status_code == 200
    assert 'gpt_serve_requests_total{status="200",task="birds",tenant=""} 1.0' in client.get("/metrics").text


def test_an_error_of_whoever_answers_is_a_problem(client: TestClient) -> None:
    response = client.post("/predict", data={"task": "birds"}, files={"image": ("x", b"bad")})
    assert response.status_code == 422 and response.json()["detail"] == "damaged"


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:;base64,", "DATA:image/webp;x=y;BASE64,"])
def test_a_data_uri_is_an_image(client: TestClient, stub: Stub, head: str) -> None:
    image = head + base64.b64encode(b"12345").decode()
    assert client.post("/predict", json={"task": "birds", "image": image}).status_code == 200
    assert stub.items[0].image == b"12345"


@pytest.mark.parametrize("image", ["data:image/png,abcd", "data:image/png;base64", "data:", "data:;base64,!"])
def test_a_data_uri_without_base64_is_refused(client: TestClient, image: str) -> None:
    response = client.post("/predict", json={"task": "birds", "image": image})
    assert response.status_code == 400 and "base64" in response.json()["detail"]
