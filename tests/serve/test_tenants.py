"""Who is let in, how often, and how much at once."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_serve.errors import InvalidKey, InvalidRequest, RateLimited, TaskForbidden, UsageError
from gpt_serve.serve import tenants
from gpt_serve.serve.keyfile import Tenant, add_key, revoke
from gpt_serve.serve.tenants import EVERYBODY, OWNER, Allowances, Doorkeeper
from tests.serve.harness import until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "POLL", 0.02)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, which passes only when a test says so."""
    clock = [1000.0]
    monkeypatch.setattr("gpt_serve.serve.tenants.time.monotonic", lambda: clock[0])
    yield clock


def test_without_keys_everybody_is_let_in() -> None:
    door = Doorkeeper()
    assert door.is_open and door.tenant("") is door.tenant("anything") is EVERYBODY


def test_the_single_key_opens_everything() -> None:
    door = Doorkeeper(key="secret")
    assert not door.is_open and door.tenant("secret") is OWNER and OWNER.may_ask("anything")
    for wrong, says in (("", "a key is needed"), ("Secret", "this key is not known"), ("\udcff", "this key")):
        with pytest.raises(InvalidKey, match=says):
            door.tenant(wrong)


def test_each_tenant_has_keys_of_its_own(path: Path) -> None:
    (one, acme), (two, _), (other, umbrella) = add_key(path, "acme"), add_key(path, "acme"), add_key(path, "umbrella")
    door = Doorkeeper(path, "single")
    assert door.tenant(one).name == door.tenant(two).name == acme.name
    assert door.tenant(other) == umbrella and door.tenant("single") is OWNER
    door.close()


def test_the_file_is_followed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gpt_serve")
    kept, tenant = add_key(path, "acme")
    door = Doorkeeper(path)

    def known(key: str) -> bool:
        try:
            return bool(door.tenant(key))
        except InvalidKey:
            return False

    new, _ = add_key(path, "umbrella")
    until(lambda: known(new))
    revoke(path, tenant.keys[0].id)
    until(lambda: not known(kept))
    path.write_text("damaged")
    until(lambda: "the keys stay as they were" in caplog.text)
    assert known(new) and not known(kept)
    path.unlink()
    until(lambda: "does not exist" in caplog.text)
    assert known(new)
    again, _ = add_key(path, "third")
    until(lambda: known(again))
    assert not known(new)
    door.close()


def test_a_server_does_not_start_on_a_file_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        Doorkeeper(path)


def test_a_key_opens_its_tasks_only() -> None:
    door, tenant = Doorkeeper(), Tenant("acme", ("acme-*",))
    door.check_task(tenant, "acme-birds")
    with pytest.raises(TaskForbidden, match="does not open the task 'flowers'"):
        door.check_task(tenant, "flowers")


@pytest.mark.parametrize(("rate", "burst"), [(5.0, 5), (0.5, 1)])
def test_requests_are_limited_by_the_second(now: list[float], rate: float, burst: int) -> None:
    allowances, tenant = Allowances(), Tenant("acme", rate=rate)
    for _ in range(burst):
        allowances.count_request(tenant)
    with pytest.raises(RateLimited) as caught:
        allowances.count_request(tenant)
    assert caught.value.seconds == pytest.approx(1 / rate)
    now[0] += caught.value.seconds
    allowances.count_request(tenant)
    with pytest.raises(RateLimited):
        allowances.count_request(tenant)
    now[0] += 3600  # what is not used is not saved up
    for _ in range(burst):
        allowances.count_request(tenant)
    with pytest.raises(RateLimited):
        allowances.count_request(tenant)


def test_over_a_long_time_the_rate_holds(now: list[float]) -> None:
    allowances, tenant, taken = Allowances(), Tenant("acme", rate=4.0), 0
    for _ in range(1000):
        now[0] += 0.1
        try:
            allowances.count_request(tenant)
            taken += 1
        except RateLimited:
            pass
    assert taken == pytest.approx(400, abs=5)


def test_answers_in_flight_are_limited_and_given_back() -> None:
    allowances, tenant, other = Allowances(), Tenant("acme", in_flight=3), Tenant("umbrella", in_flight=3)
    allowances.take(tenant, 2)
    allowances.take(other, 3)
    allowances.take(tenant, 1)
    with pytest.raises(RateLimited, match="more than 3 answers at once"):
        allowances.take(tenant, 1)
    allowances.give(tenant, 1)
    allowances.take(tenant, 1)
    allowances.give(tenant, 3)
    allowances.take(tenant, 3)
    with pytest.raises(InvalidRequest, match="ask for fewer"):
        allowances.take(tenant, 4)


def test_several_answers_are_paid_for_by_those_that_come_later(now: list[float]) -> None:
    allowances, tenant = Allowances(), Tenant("acme", rate=1.0)
    allowances.count_request(tenant)
    allowances.take(tenant, 5)
    with pytest.raises(RateLimited) as caught:
        allowances.count_request(tenant)
    assert caught.value.seconds == pytest.approx(5)


def test_limits_hold_for_a_tenant_not_for_each_key(path: Path, now: list[float]) -> None:
    (one, _), (two, _) = add_key(path, "acme", rate=1.0), add_key(path, "acme")
    door, allowances = Doorkeeper(path), Allowances()
    allowances.count_request(door.tenant(one))
    with pytest.raises(RateLimited):
        allowances.count_request(door.tenant(two))
    door.close()


def test_nothing_is_counted_where_there_is_no_limit(now: list[float]) -> None:
    allowances = Allowances()
    for _ in range(10_000):
        allowances.count_request(EVERYBODY)
    allowances.take(EVERYBODY, 10**6)
