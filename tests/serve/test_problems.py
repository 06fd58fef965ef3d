"""The table of status codes, and what a problem looks like."""

import json

import pytest

from gpt_serve import errors
from gpt_serve.serve.problems import RETRY_AFTER, STATUS, HTTPError, problem_of


def leaves(cls: type[errors.GPTServeError]) -> list[type[errors.GPTServeError]]:
    below = [leaf for child in cls.__subclasses__() for leaf in leaves(child)]
    return below or [cls]


@pytest.mark.parametrize("leaf", leaves(errors.GPTServeError))
def test_every_error_has_a_status(leaf: type[errors.GPTServeError]) -> None:
    status, title = STATUS[leaf]
    assert 400 <= status < 600 and title


def test_every_503_says_when_to_retry() -> None:
    knowing = {cls for cls in STATUS if issubclass(cls, errors.TurnedAway)}
    assert {cls for cls, (status, _) in STATUS.items() if status == 503} - knowing == set(RETRY_AFTER)
    assert problem_of(errors.Overloaded("full", 2.1)).headers["retry-after"] == "3"


def test_problem_of_a_clients_error() -> None:
    response = problem_of(errors.UnknownTask("no task 'x'"))
    assert response.status_code == 404 and response.media_type == "application/problem+json"
    assert json.loads(response.body) == {
        "type": "urn:gpt-serve:problem:unknown-task",
        "title": "Unknown task",
        "status": 404,
        "detail": "no task 'x'",
    }


def test_an_internal_error_keeps_its_details(caplog: pytest.LogCaptureFixture) -> None:
    for error in (RuntimeError("secret"), errors.CheckpointError("secret"), errors.GPTServeError("secret")):
        response = problem_of(error)
        assert response.status_code == 500 and b"secret" not in response.body


def test_a_detail_may_quote_a_lone_surrogate() -> None:
    assert json.loads(problem_of(errors.InvalidRequest("\ud800")).body)["detail"] == "\ud800"


def test_http_errors_keep_their_headers() -> None:
    response = problem_of(HTTPError(401, "no key", {"WWW-Authenticate": "APIKey"}))
    assert response.status_code == 401 and response.headers["www-authenticate"] == "APIKey"
