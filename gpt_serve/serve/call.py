"""One ``POST /predict`` from its headers to its answer."""

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.responses import Response

from gpt_serve.errors import (
    BackboneMismatch,
    BankFull,
    DeadlineExceeded,
    GPTServeError,
    ImageError,
    InvalidAdapter,
    NotReady,
    Overloaded,
    TaskForbidden,
)
from gpt_serve.serve import problems
from gpt_serve.serve.access import KEY, AnswerRecord, Record
from gpt_serve.serve.bodies import ClientLeft
from gpt_serve.serve.gate import failed
from gpt_serve.serve.inputs import PredictRequest, check_media_type, media_type, parse
from gpt_serve.serve.keyfile import Tenant
from gpt_serve.serve.messages import Answer, Format, Item
from gpt_serve.serve.problems import HTTPError

if TYPE_CHECKING:
    from gpt_serve.serve.app import Door

PARSED_IN_THE_LOOP = 64 * 2**10
"""Bodies of up to so many bytes are parsed in the event loop: handing them to a thread costs more than that."""

REFUSAL_SECONDS = 0.25
"""How long the news that there is no room is held back: clients that ask again at once would keep others waiting."""

Outcome = Answer | GPTServeError

_OF_STORED_TASKS = (ImageError, InvalidAdapter, BackboneMismatch, BankFull)
"""Errors that come only after the task was found. Names that clients make up are endless, and are not noted."""


class Call:
    """A prediction on its way through the HTTP side.

    Args:
        door: what the routes know.
        request: with its body still to be read; its path may name the task.
        attention: whether a picture of where the adapter looks is wanted instead.
    """

    def __init__(self, door: "Door", request: Request, *, attention: bool = False) -> None:
        self.door = door
        self.attention = attention
        self.request = request
        self.expires = time.monotonic() + door.config.deadline
        self.record: Record = request.scope[KEY]
        self.tenant: Tenant

    async def response(self) -> Response:
        """The answer or the problem."""
        try:
            wanted = await self._read()
            tasks = await self._tasks(wanted)
            asked = [(task, image) for image in wanted.images for task in tasks]
            self._check_number(len(asked))
            self.record.images = len(wanted.images)
            await self.door.desk.take(self.tenant, len(asked))
            try:
                outcomes = await self._outcomes(asked, self._format(wanted))
            finally:
                self.door.desk.give(self.tenant, len(asked))
        except ClientLeft:
            return Response(status_code=499)  # nobody hears it; for the log and the metrics
        except Overloaded as error:
            await asyncio.sleep(REFUSAL_SECONDS)
            return problems.problem_of(error)
        except (GPTServeError, HTTPError) as error:
            return problems.problem_of(error)
        self._note([task for task, _ in asked], outcomes)
        return _response(wanted, tasks, outcomes)

    async def _tasks(self, wanted: PredictRequest) -> Sequence[str]:
        """The tasks that are asked, all that the key opens where none are named."""
        if wanted.tasks is not None:
            return wanted.tasks
        stored = await self.door.desk.tasks()
        return [task for task in stored if self.tenant.may_ask(task)]

    def _check_number(self, count: int) -> None:
        most = self.door.config.queue_limit
        if count > most:
            raise HTTPError(
                413,
                f"the request asks for {count} answers, one for each task and image, and this server takes on {most} "
                "at once: ask for fewer",
            )

    def _note(self, tasks: Sequence[str], outcomes: Sequence[Outcome]) -> None:
        """Say in the record what became of each task and image."""
        for task, outcome in zip(tasks, outcomes, strict=True):
            if isinstance(outcome, Answer):
                self.record.answers.append(AnswerRecord(task, outcome.revision, 200))
                for part, seconds in outcome.seconds.items():
                    self.record.seconds[part] = max(seconds, self.record.seconds.get(part, 0.0))
            else:
                stored = task if isinstance(outcome, _OF_STORED_TASKS) else ""
                self.record.answers.append(AnswerRecord(stored, "", problems.status_of(outcome)))

    async def _read(self) -> PredictRequest:
        """The request, once it is there; what can be refused before the body is read is refused then."""
        door, request = self.door, self.request
        self.tenant = door.tenant(request)
        await door.desk.count_request(self.tenant)
        door.desk.state.check_ready()
        task = request.path_params.get("task", "")
        kind = media_type(request.headers)
        if not task:
            check_media_type(kind)
        began = time.monotonic()
        body = await door.bodies.read(request.receive, request.headers.get("content-length"))
        self.record.seconds["reading"] = time.monotonic() - began
        query = request.query_params.multi_items() if request.scope["query_string"] else ()
        if len(body) <= PARSED_IN_THE_LOOP:
            return parse(request.headers, query, body, task)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(door.parsing, parse, request.headers, query, body, task)

    def _format(self, wanted: PredictRequest) -> Format:
        accepted = self.request.headers.get("accept", "")
        picture = "image/png" in accepted and "*/*" not in accepted and "application/json" not in accepted
        alone = not wanted.several_images and not wanted.several_tasks
        return Format(wanted.top_k, wanted.mask, picture=picture and alone, strict=not wanted.several_tasks)

    async def _outcomes(self, asked: Sequence[tuple[str, bytes]], form: Format) -> list[Outcome]:
        """What became of each task and image, in order."""
        jobs: list[asyncio.Future[Answer]] = []
        try:
            for task, image in asked:
                jobs.append(self._ask(Item(task, image, form, self.expires, self.record.tenant, self.attention)))
            await self._finished(jobs)
            outcomes = [self._outcome(job) for job in jobs]
        finally:
            for job in jobs:
                job.cancel()  # nobody waits for it any more, if it is not done
        refused = [outcome for outcome in outcomes if isinstance(outcome, NotReady | Overloaded)]
        if refused and len(refused) == len(outcomes):
            raise refused[0]  # there is no room for any of it
        return outcomes

    def _ask(self, item: Item) -> "asyncio.Future[Answer]":
        try:
            self.door.keeper.check_task(self.tenant, item.task)
        except TaskForbidden as error:
            return failed(error)
        return self.door.desk.ask(item)

    async def _finished(self, jobs: "Sequence[asyncio.Future[Answer]]") -> None:
        """Wait for all ``jobs``, or for the deadline. Raises `ClientLeft` if that comes first."""
        left = asyncio.ensure_future(self._left())
        pending: set[asyncio.Future[Any]] = set(jobs)
        try:
            while pending:
                remaining = self.expires - time.monotonic()
                done, _ = await asyncio.wait({left, *pending}, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
                pending -= done
                if pending and left in done:
                    raise ClientLeft
                if not done:
                    return
        finally:
            left.cancel()

    async def _left(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def _outcome(self, job: "asyncio.Future[Answer]") -> Outcome:
        if not job.done():
            return DeadlineExceeded(f"no answer within {self.door.config.deadline:g} s: try again later")
        error = job.exception()
        if error is None:
            return job.result()
        return error if isinstance(error, GPTServeError) else GPTServeError(repr(error))


def _response(wanted: PredictRequest, tasks: Sequence[str], outcomes: Sequence[Outcome]) -> Response:
    """One outcome, a list of them by image or by task, or for each image a list by task."""
    if not wanted.several_images and not wanted.several_tasks:
        return _single(outcomes[0])
    images = [outcomes[at * len(tasks) : (at + 1) * len(tasks)] for at in range(len(wanted.images))]
    if wanted.several_tasks:
        parts = [
            _list([_element(outcome, task=task) for outcome, task in zip(own, tasks, strict=True)]) for own in images
        ]
    else:
        parts = [_element(own[0]) for own in images]
    return Response(_list(parts) if wanted.several_images else parts[0], media_type="application/json")


def _single(outcome: Outcome) -> Response:
    if isinstance(outcome, GPTServeError):
        return problems.problem_of(outcome)
    return Response(outcome.content, media_type=outcome.media_type)


def _list(elements: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(elements) + b"]"


def _element(outcome: Outcome, **members: str) -> bytes:
    """An answer or a problem as part of a list; a problem does not say by itself which task it is about."""
    if isinstance(outcome, GPTServeError):
        return bytes(problems.problem_of(outcome, **members).body)
    return outcome.content
