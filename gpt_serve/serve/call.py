"""One ``POST /predict`` from its headers to its answer."""

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.responses import Response

from gpt_serve.errors import DeadlineExceeded, GPTServeError, Overloaded, UnknownTask
from gpt_serve.serve import problems
from gpt_serve.serve.access import KEY, Record
from gpt_serve.serve.bodies import ClientLeft
from gpt_serve.serve.inputs import PredictRequest, check_media_type, media_type, parse
from gpt_serve.serve.keyfile import Tenant
from gpt_serve.serve.messages import Answer, Item
from gpt_serve.serve.problems import HTTPError

if TYPE_CHECKING:
    from gpt_serve.serve.app import Door

PARSED_IN_THE_LOOP = 64 * 2**10
"""Bodies of up to so many bytes are parsed in the event loop: handing them to a thread costs more than that."""

REFUSAL_SECONDS = 0.25
"""How long the news that there is no room is held back: clients that ask again at once would keep others waiting."""

Outcome = Answer | GPTServeError


class Call:
    """A prediction on its way through the HTTP side.

    Args:
        door: what the routes know.
        request: with its body still to be read; its path may name the task.
    """

    def __init__(self, door: "Door", request: Request) -> None:
        self.door = door
        self.request = request
        self.expires = time.monotonic() + door.config.deadline
        self._displaced: set[asyncio.Future[Answer]] = set()
        self.record: Record = request.scope[KEY]
        self.tenant: Tenant

    async def response(self) -> Response:
        """The answer or the problem."""
        try:
            wanted = await self._read()
            self.door.keeper.check_task(self.tenant, wanted.task)
            self.record.images = len(wanted.images)
            with self.door.keeper.images(self.tenant, len(wanted.images)):
                outcomes = await self._outcomes(wanted)
        except ClientLeft:
            return Response(status_code=499)  # nobody hears it; for the log and the metrics
        except Overloaded as error:
            await asyncio.sleep(REFUSAL_SECONDS)
            return problems.problem_of(error)
        except (GPTServeError, HTTPError) as error:
            return problems.problem_of(error)
        self._note(wanted.task, outcomes)
        return _several(outcomes) if wanted.several else _single(outcomes[0])

    def _note(self, task: str, outcomes: Sequence[Outcome]) -> None:
        """Say in the record what became of the request."""
        if not all(isinstance(outcome, UnknownTask) for outcome in outcomes):
            self.record.task = task
        for outcome in outcomes:
            if isinstance(outcome, Answer):
                self.record.revision = outcome.revision
                for part, seconds in outcome.seconds.items():
                    self.record.seconds[part] = max(seconds, self.record.seconds.get(part, 0.0))

    async def _read(self) -> PredictRequest:
        """The request, once it is there; what can be refused before the body is read is refused then."""
        door, request = self.door, self.request
        self.tenant = door.tenant(request)
        door.keeper.count_request(self.tenant)
        door.state.check_ready()
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

    async def _outcomes(self, wanted: PredictRequest) -> list[Outcome]:
        """What became of each image, in order."""
        jobs: list[asyncio.Future[Answer]] = []
        try:
            for image in wanted.images:
                jobs.append(self._ask(Item(wanted.task, image, wanted.top_k, self.expires)))
            await self._finished(jobs)
        finally:
            for job in jobs:
                job.cancel()  # nobody waits for it any more, if it is not done
        return [self._outcome(job) for job in jobs]

    def _ask(self, item: Item) -> "asyncio.Future[Answer]":
        state = self.door.state
        slot = state.admit(item.task, lambda: self._displace(job))
        try:
            job = self.door.asks.ask(item)
        except BaseException:
            state.release(slot)
            raise

        def settled(job: "asyncio.Future[Answer]") -> None:
            state.release(slot)
            if not job.cancelled():
                job.exception()  # when nobody waits for the answer any more, nobody need hear of it

        job.add_done_callback(settled)
        return job

    def _displace(self, job: "asyncio.Future[Answer]") -> None:
        self._displaced.add(job)
        job.cancel()

    async def _finished(self, jobs: "Sequence[asyncio.Future[Answer]]") -> None:
        """Wait for all ``jobs``. Raises `DeadlineExceeded` or `ClientLeft` if that comes first."""
        left = asyncio.ensure_future(self._left())
        pending: set[asyncio.Future[Any]] = set(jobs)
        try:
            while pending:
                remaining = self.expires - time.monotonic()
                done, _ = await asyncio.wait({left, *pending}, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
                pending -= done
                if pending and left in done:
                    raise ClientLeft
                if pending and not done:
                    deadline = self.door.config.deadline
                    raise DeadlineExceeded(f"no answer within {deadline:g} s: try again later")
        finally:
            left.cancel()

    async def _left(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def _outcome(self, job: "asyncio.Future[Answer]") -> Outcome:
        if job.cancelled():
            return Overloaded("the place in the queue went to a task with fewer images waiting: try again in a second")
        error = job.exception()
        if error is None:
            return job.result()
        return error if isinstance(error, GPTServeError) else GPTServeError(repr(error))


def _single(outcome: Outcome) -> Response:
    if isinstance(outcome, GPTServeError):
        return problems.problem_of(outcome)
    return Response(outcome.content, media_type=outcome.media_type)


def _several(outcomes: Sequence[Outcome]) -> Response:
    """A list with an answer or a problem for each image, in order."""
    return Response(b"[" + b",".join(map(_element, outcomes)) + b"]", media_type="application/json")


def _element(outcome: Outcome) -> bytes:
    return bytes(problems.problem_of(outcome).body) if isinstance(outcome, GPTServeError) else outcome.content
