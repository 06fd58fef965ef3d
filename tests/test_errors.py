"""The tree of errors, and the way from one process to another."""

import pytest

from gpt_serve import errors
from gpt_serve.errors import GPTServeError, revive


def below(cls: type[GPTServeError]) -> list[type[GPTServeError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in below(child))]


@pytest.mark.parametrize("cls", [cls for cls in below(GPTServeError) if cls.__module__ == errors.__name__])
def test_an_error_survives_the_way_between_processes(cls: type[GPTServeError]) -> None:
    """Every class of the tree, also those above the leaves, which no table of status codes need list."""
    error = revive(cls.__name__, "why")
    assert type(error) is cls and str(error) == "why"


def test_what_nobody_raised_on_purpose_is_the_base() -> None:
    for name in ("RuntimeError", "revive", "", "__name__"):
        assert type(revive(name, "why")) is GPTServeError
