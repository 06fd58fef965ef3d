"""The interface is what its description says: schemathesis makes requests from ``/openapi.json`` and judges answers."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_serve.serve.keyfile import add_key
from tests.serve.harness import ServerProcess, serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CASES = 200  # at least, of all phases together: fewer would mean that nothing was tried


@pytest.fixture(scope="module")
def key_and_path(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return add_key(path, "tester")[0], path


@pytest.fixture(scope="module", params=["open", "with keys"])
def server(request: pytest.FixtureRequest, key_and_path: tuple[str, Path]) -> Iterator[ServerProcess]:
    options = {"keys": str(key_and_path[1])} if request.param == "with keys" else {}
    yield from serving(ROOT / "adapters" / "mae-vit-tiny-32", engine="torch", **options)


@pytest.fixture(scope="module")
def key(server: ServerProcess, key_and_path: tuple[str, Path]) -> str:
    """Empty where the server wants none."""
    return "" if server.get("/tasks").status_code == 200 else key_and_path[0]


def test_schemathesis_finds_nothing(server: ServerProcess, key: str, tmp_path: Path) -> None:
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("needs schemathesis")
    # The seed is fixed: schemathesis takes false in a form, which travels as the text of a valid name, for no string.
    options = ["--checks", "all", "--max-examples", "10", "--seed", "1", "--no-color"]
    headers = ["-H", f"X-API-Key: {key}"] if key else []
    run = subprocess.run(
        [
            program,
            "--config-file",
            str(Path(__file__).with_name("schemathesis.toml")),
            "run",
            server.url + "/openapi.json",
            *options,
            *headers,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    generated = re.search(r"(\d+) generated", run.stdout)
    assert generated is not None and int(generated[1]) >= CASES, run.stdout
    assert server.get("/ready").status_code == 200


def test_a_key_is_described_where_one_is_needed(server: ServerProcess, key: str) -> None:
    description = server.get("/openapi.json").json()
    wanted = {
        (method, path)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
        if operation.get("security")
    }
    guarded = {("post", path) for path in ("/predict", "/predict/{task}", "/attention/{task}")}
    guarded |= {("get", "/tasks"), ("get", "/tasks/{task}")}
    assert wanted == (guarded | {("get", "/metrics")} if key else set())


def test_every_error_is_described_as_a_problem(server: ServerProcess) -> None:
    for path, methods in server.get("/openapi.json").json()["paths"].items():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                assert status == "200" or list(response["content"]) == ["application/problem+json"], (path, status)
