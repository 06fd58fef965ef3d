"""A hub that cannot be reached: no waiting, what is cached still counts."""

import socket
import threading
import time
from typing import Any

import pytest
from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from gpt_serve.errors import BackboneError
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.hub import offline_without_answer


def no_name(*args: Any, **options: Any) -> Any:
    raise socket.gaierror(-2, "Name or service not known")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where something waits in order to ask again."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))


@pytest.mark.usefixtures("no_waiting")
def test_weights_are_refused_at_once_where_there_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(BackboneError, match="cannot be had from the hub; pass --checkpoint FILE") as caught:
        Backbone.load("vit_tiny_patch16_224")
    assert len(str(caught.value).splitlines()) == 1
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("no_waiting")
def test_a_look_up_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, end = threading.Event(), threading.Event()

    def hang(*args: Any, **options: Any) -> Any:
        asked.set()
        end.wait()
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with offline_without_answer(patience=0.5):
        end.set()
        assert asked.is_set() and constants.HF_HUB_OFFLINE
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download("owner/name", "model.safetensors")


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(get_session(), "head", lambda url, **options: "an error page, perhaps")
    with offline_without_answer():
        assert not constants.HF_HUB_OFFLINE


def test_who_is_offline_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: pytest.fail("asked"))
    with offline_without_answer():
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE
