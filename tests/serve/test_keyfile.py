"""The file of tenants and keys."""

import json
import re
import stat
import threading
from pathlib import Path

import pytest

from gpt_serve.errors import UsageError
from gpt_serve.serve.keyfile import FORMAT, Tenant, add_key, digest_of, load_tenants, revoke


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_is_kept_as_a_hash_only(path: Path) -> None:
    key, tenant = add_key(path, "acme", tasks=("flowers", "acme-*"), rate=20.0, in_flight=8)
    assert len(key) > 40 and key not in path.read_text()
    assert load_tenants(path) == {"acme": tenant}
    assert (tenant.tasks, tenant.rate, tenant.in_flight) == (("flowers", "acme-*"), 20.0, 8)
    (stored,) = tenant.keys
    assert stored.sha256 == digest_of(key) and stored.id == stored.sha256[:8]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", stored.created)


def test_keys_differ(path: Path) -> None:
    assert len({add_key(path, "acme")[0] for _ in range(5)}) == 5
    assert len(load_tenants(path)["acme"].keys) == 5


def test_another_key_leaves_the_limits_and_new_limits_leave_the_keys(path: Path) -> None:
    first = add_key(path, "acme", rate=5.0)[1]
    second = add_key(path, "acme")[1]
    third = add_key(path, "acme", tasks=("digits",))[1]
    assert second.rate == third.rate == 5.0 and third.tasks == ("digits",)
    assert third.keys[:2] == second.keys and second.keys[:1] == first.keys


def test_a_key_or_a_tenant_is_revoked(path: Path) -> None:
    add_key(path, "acme")
    two = add_key(path, "acme")[1]
    other = add_key(path, "umbrella")[1]
    assert revoke(path, two.keys[0].id) == [two.keys[0].id]
    assert load_tenants(path)["acme"].keys == two.keys[1:]
    assert revoke(path, "acme") == [two.keys[1].id]
    assert load_tenants(path) == {"umbrella": other}
    with pytest.raises(UsageError, match="has no tenant or key 'acme': gpt-serve keys list"):
        revoke(path, "acme")


def test_commands_at_the_same_time_lose_nothing(path: Path) -> None:
    threads = [threading.Thread(target=add_key, args=(path, f"tenant-{number % 3}")) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(tenant.keys) for tenant in load_tenants(path).values()] == [4, 4, 4]


def test_a_failed_change_leaves_the_file_as_it_was(path: Path) -> None:
    add_key(path, "acme")
    before = path.read_bytes()
    with pytest.raises(UsageError):
        add_key(path, "acme", tasks=("no spaces, please",))
    assert path.read_bytes() == before
    assert not [file for file in path.parent.iterdir() if file.suffix == ".json" and file != path]


def test_only_its_own_format_is_taken(path: Path) -> None:
    good = {"tasks": ["*"], "rate": None, "in_flight": None, "keys": []}
    key = {"id": "1", "sha256": "0" * 64, "created": ""}
    for content, says in (
        ("no json", "is not a file of keys"),
        ([], "is not a file of keys"),
        ({"format": "gpt-serve-keys/2", "tenants": {}}, "has the format 'gpt-serve-keys/2'"),
        ({"format": FORMAT}, "KeyError: 'tenants'"),
        ({"format": FORMAT, "tenants": []}, "is not a file of keys"),
        ({"format": FORMAT, "tenants": {"acme": {}}}, "is not a file of keys"),
        ({"format": FORMAT, "tenants": {"Acme": good}}, "tenant 'Acme': use 1 to 64 of"),
        ({"format": FORMAT, "tenants": {"acme": good | {"tasks": "flowers"}}}, "tasks of acme are no list"),
        ({"format": FORMAT, "tenants": {"acme": good | {"tasks": ["[a]"]}}}, "'[a]' matches no task"),
        ({"format": FORMAT, "tenants": {"acme": good | {"tasks": [1]}}}, "is not a file of keys"),
        ({"format": FORMAT, "tenants": {"acme": good | {"rate": 0}}}, "rate is 0: it must be"),
        ({"format": FORMAT, "tenants": {"acme": good | {"rate": "5"}}}, "is not a file of keys"),
        ({"format": FORMAT, "tenants": {"acme": good | {"in_flight": -1}}}, "in_flight is -1"),
        ({"format": FORMAT, "tenants": {"acme": good | {"keys": [key | {"sha256": "x"}]}}}, "has no SHA-256"),
        ({"format": FORMAT, "tenants": {"acme": good | {"keys": [key | {"more": "x"}]}}}, "is not a file of keys"),
    ):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UsageError, match=re.escape(says)) as caught:
            load_tenants(path)
        assert "\n" not in str(caught.value)


def test_a_missing_file_says_how_to_make_one(path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist: gpt-serve keys add TENANT --keys"):
        load_tenants(path)
    with pytest.raises(UsageError, match="cannot be written: No such file"):
        add_key(path.parent / "none" / "keys.json", "acme")


def test_whoever_runs_the_server_may_read_the_file(path: Path) -> None:
    """It holds no secrets, and the one who adds keys need not be the one who serves."""
    add_key(path, "acme")
    assert stat.S_IMODE(path.stat().st_mode) & 0o444


@pytest.mark.parametrize(
    ("pattern", "task", "matches"),
    [
        ("*", "flowers", True),
        ("flowers", "flowers", True),
        ("flowers", "flowers2", False),
        ("acme-*", "acme-a", True),
        ("acme-*", "acme", False),
        ("acme-?", "acme-ab", False),
        ("a.b", "axb", False),
    ],
)
def test_patterns(pattern: str, task: str, matches: bool) -> None:
    assert Tenant("acme", (pattern,)).may_ask(task) is matches
