"""The two clients. They differ in how they wait; what is sent and what comes of it is the same."""

import asyncio
import os
import time
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from gpt_serve.client.answers import Answer, answer_of, answers_by_task, answers_of, error_of, object_of
from gpt_serve.client.retries import Attempts, Retries
from gpt_serve.errors import GPTServeError, ServerError, UsageError

Image = bytes | str | os.PathLike[str]
"""The bytes of a JPEG, PNG or WebP file, or its path."""

Outcome = httpx.Response | httpx.TransportError


class Client:
    """A client that waits.

    Args:
        url: address of the server, such as ``http://localhost:8000``; a path in it is kept.
        key: for a server that wants one; taken from ``$GPT_SERVE_KEY`` when it is not given.
        timeout: seconds to connect, and between two bytes of an answer.
        retries: when a request is sent again.

    Every method raises the `gpt_serve.errors.GPTServeError` that the server names, and `ServerError` when there is no
    server, or one that does not answer as GPT-Serve does. Threads may share a client.
    """

    def __init__(
        self, url: str, *, key: str | None = None, timeout: float = 60.0, retries: Retries | None = None
    ) -> None:
        self._http = httpx.Client(base_url=_checked(url), headers=_headers(key), timeout=timeout)
        self._retries = retries or Retries()

    def predict(self, task: str, image: Image, *, top_k: int | None = None) -> Answer:
        """Ask ``task`` about ``image``; ``top_k`` is the most classes in the answer, by default the server's."""
        return answer_of(self._send("POST", "predict", **_question(task, image, top_k)))

    def predict_batch(
        self, task: str, images: Sequence[Image], *, top_k: int | None = None
    ) -> list[Answer | GPTServeError]:
        """Ask ``task`` about several images in one request.

        Returns:
            For each image, in order, the answer, or the error that kept this one from being answered.
        """
        return answers_of(self._send("POST", "predict", **_questions(task, images, top_k)), len(images))

    def predict_tasks(
        self, image: Image, tasks: Sequence[str] | None = None, *, top_k: int | None = None
    ) -> dict[str, Answer | GPTServeError]:
        """Ask several tasks about ``image`` in one request: what they share is computed once.

        Args:
            tasks: their names; None for all that the key opens.
            top_k: the most classes in an answer; masks have all.

        Returns:
            For each task the answer, or the error that kept this one from answering.
        """
        return answers_by_task(self._send("POST", "predict", **_question_to_all(image, tasks, top_k)))

    def tasks(self) -> list[dict[str, Any]]:
        """The stored tasks, as ``GET /tasks`` lists them."""
        return _listed(self._send("GET", "tasks"))

    def task(self, name: str) -> dict[str, Any]:
        """One task, with its labels."""
        return object_of(self._send("GET", f"tasks/{quote(name, safe='')}"))

    def ready(self) -> dict[str, Any]:
        """The backbone of a server that takes requests on. Raises `NotReady` when the last attempt was in vain."""
        return object_of(self._send("GET", "ready"))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _send(self, method: str, path: str, **parts: Any) -> httpx.Response:
        attempts = Attempts(self._retries)
        while True:
            outcome: Outcome
            try:
                outcome = self._http.request(method, path, **parts)
            except httpx.TransportError as error:
                outcome = error
            seconds = attempts.pause(outcome)
            if seconds is None:
                return _checked_response(outcome)
            time.sleep(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """A client for coroutines; as `Client`, with methods to ``await``."""

    def __init__(
        self, url: str, *, key: str | None = None, timeout: float = 60.0, retries: Retries | None = None
    ) -> None:
        self._http = httpx.AsyncClient(base_url=_checked(url), headers=_headers(key), timeout=timeout)
        self._retries = retries or Retries()

    async def predict(self, task: str, image: Image, *, top_k: int | None = None) -> Answer:
        """See `Client.predict`."""
        question = await asyncio.to_thread(_question, task, image, top_k)  # it may read a file
        return answer_of(await self._send("POST", "predict", **question))

    async def predict_batch(
        self, task: str, images: Sequence[Image], *, top_k: int | None = None
    ) -> list[Answer | GPTServeError]:
        """See `Client.predict_batch`."""
        questions = await asyncio.to_thread(_questions, task, images, top_k)  # it may read files
        return answers_of(await self._send("POST", "predict", **questions), len(images))

    async def predict_tasks(
        self, image: Image, tasks: Sequence[str] | None = None, *, top_k: int | None = None
    ) -> dict[str, Answer | GPTServeError]:
        """See `Client.predict_tasks`."""
        question = await asyncio.to_thread(_question_to_all, image, tasks, top_k)  # it may read a file
        return answers_by_task(await self._send("POST", "predict", **question))

    async def tasks(self) -> list[dict[str, Any]]:
        """See `Client.tasks`."""
        return _listed(await self._send("GET", "tasks"))

    async def task(self, name: str) -> dict[str, Any]:
        """See `Client.task`."""
        return object_of(await self._send("GET", f"tasks/{quote(name, safe='')}"))

    async def ready(self) -> dict[str, Any]:
        """See `Client.ready`."""
        return object_of(await self._send("GET", "ready"))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _send(self, method: str, path: str, **parts: Any) -> httpx.Response:
        attempts = Attempts(self._retries)
        while True:
            outcome: Outcome
            try:
                outcome = await self._http.request(method, path, **parts)
            except httpx.TransportError as error:
                outcome = error
            seconds = attempts.pause(outcome)
            if seconds is None:
                return _checked_response(outcome)
            await asyncio.sleep(seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()


def _checked(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url!r} is not the address of a server: give one such as http://localhost:8000")
    return url


def _headers(key: str | None) -> dict[str, str]:
    key = os.environ.get("GPT_SERVE_KEY") if key is None else key
    return {"X-API-Key": key} if key else {}


def _question(task: str, image: Image, top_k: int | None) -> dict[str, Any]:
    fields = {"task": task} | ({} if top_k is None else {"top_k": str(top_k)})
    return {"data": fields, "files": {"image": ("image", _content(image))}}


def _questions(task: str, images: Sequence[Image], top_k: int | None) -> dict[str, Any]:
    """JSON, in which one image may be a list, too."""
    if isinstance(images, bytes | str) or not images:
        raise UsageError("give a list of one image or more")
    fields = {"task": task} | ({} if top_k is None else {"top_k": top_k})
    return {"json": fields | {"image": [b64encode(_content(image)).decode() for image in images]}}


def _question_to_all(image: Image, tasks: Sequence[str] | None, top_k: int | None) -> dict[str, Any]:
    """JSON, in which one task may be a list, too."""
    if isinstance(tasks, str) or (tasks is not None and not tasks):
        raise UsageError("give a list of one task or more, or none of it for all tasks")
    asked: dict[str, Any] = {"tasks": "*"} if tasks is None else {"task": list(tasks)}
    fields = asked | ({} if top_k is None else {"top_k": top_k})
    return {"json": fields | {"image": b64encode(_content(image)).decode()}}


def _content(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise UsageError(f"{image} cannot be read: {error.strerror}") from error


def _checked_response(outcome: Outcome) -> httpx.Response:
    if isinstance(outcome, httpx.TransportError):
        address = f"{outcome.request.url.scheme}://{outcome.request.url.netloc.decode()}"
        reason = str(outcome) or type(outcome).__name__
        raise ServerError(f"no answer from {address} ({reason}): check the address and the server") from outcome
    if not outcome.is_success:
        raise error_of(outcome)
    return outcome


def _listed(response: httpx.Response) -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = object_of(response).get("tasks", [])
    return tasks
