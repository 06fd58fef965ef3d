"""``gpt-serve keys``."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gpt_serve.cli.main import main
from gpt_serve.serve.keyfile import digest_of, load_tenants


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["keys", *arguments])


def test_a_key_is_the_only_thing_on_stdout() -> None:
    result = run("add", "acme", "--task", "flowers", "--task", "acme-*", "--rate", "20", "--in-flight", "8")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 1
    tenant = load_tenants(Path("keys.json"))["acme"]
    assert tenant.keys[0].sha256 == digest_of(result.stdout.strip())
    assert (tenant.tasks, tenant.rate, tenant.in_flight) == (("flowers", "acme-*"), 20.0, 8)
    assert "it is shown this once" in result.stderr


def test_lists_show_no_hash_and_no_key() -> None:
    key = json.loads(run("add", "acme", "--rate", "2.5", "--json").stdout)["key"]
    run("add", "acme")
    listed = json.loads(run("list", "--json").stdout)["tenants"]
    assert [(entry["tenant"], entry["rate"], entry["in_flight"], len(entry["keys"])) for entry in listed] == [
        ("acme", 2.5, None, 2)
    ]
    table = run("list").stdout
    assert listed[0]["keys"][0]["id"] in table and "2.5" in table and "no limit" in table
    assert key not in table and digest_of(key) not in table


def test_revoking() -> None:
    first = json.loads(run("add", "acme", "--json").stdout)["keys"][0]["id"]
    run("add", "acme")
    assert json.loads(run("revoke", first, "--json").stdout) == {"revoked": [first]}
    assert "revoked" in run("revoke", "acme").stdout
    assert json.loads(run("list", "--json").stdout) == {"tenants": []}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("list",), "keys.json does not exist"),
        (("revoke", "acme"), "keys.json does not exist"),
        (("add", "Acme Inc."), "tenant 'Acme Inc.'"),
        (("add", "acme", "--rate", "0"), "--rate"),
        (("add", "acme", "--task", "Größe"), "matches no task"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and says in result.stderr and "Traceback" not in result.stderr
