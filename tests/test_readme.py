"""What the README shows is what happens."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from gpt_serve.cli.main import main
from gpt_serve.model.catalog import SMALL
from gpt_serve.serve.problems import STATUS
from gpt_serve.train.data.datasets import open_dataset
from tests.serve.harness import ServerProcess, serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
IMAGES = {
    "flowers": "flowers12/test/{}",
    "caltech101": "caltech101/test/{}",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if "gpt-serve " in line]
    return [line.split("gpt-serve ", 1)[1].split("   #")[0].strip() for line in lines]


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_that_the_program_takes(command: str) -> None:
    name, *arguments = shlex.split(command)
    context = click.Context(main)
    found = main.get_command(context, name)
    assert found is not None
    found.make_context(name, arguments, parent=context)  # raises on an unknown or malformed option


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?make (\w+)", README)) - {"an"}
    assert {"serve", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_the_table_of_errors_lists_every_status() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d{3}) \|", README, flags=re.M)}
    assert listed == {status for status, _ in STATUS.values() if status != 500}


@pytest.fixture(scope="module")
def shipped_server() -> Iterator[ServerProcess]:
    yield from serving(ROOT / "adapters", backbone=SMALL.name)


def answers() -> list[tuple[dict[str, str], dict[str, object]]]:
    """(form fields, answer) of every curl in the README."""
    shown = []
    for block in blocks("console"):
        for call, answer in re.findall(r"^\$ curl (.*)\n(\{.*\})$", block, flags=re.M):
            shown.append((dict(re.findall(r"-F (\w+)=@?(\S+)", call)), json.loads(answer)))
    return shown


@pytest.mark.parametrize(("fields", "shown"), answers())
def test_the_answers_are_real(
    shipped_server: ServerProcess, request: pytest.FixtureRequest, fields: dict[str, str], shown: dict[str, Any]
) -> None:
    task, name = fields["task"], fields["image"]
    if task == "digits":
        data = open_dataset("digits", 0).test[0].read()
    else:
        data = (request.getfixturevalue("shared_data") / IMAGES[task].format(name)).read_bytes()
    response = shipped_server.client.post(
        shipped_server.url + "/predict", data={"task": task, "top_k": fields["top_k"]}, files={"image": (name, data)}
    )
    assert response.status_code == 200
    answer = response.json()
    assert (answer["task"], answer["revision"]) == (shown["task"], shown["revision"])
    assert [item["label"] for item in answer["predictions"]] == [item["label"] for item in shown["predictions"]]
    for real, printed in zip(answer["predictions"], shown["predictions"], strict=True):
        assert real["probability"] == pytest.approx(printed["probability"], abs=1e-3)


def test_every_shipped_task_has_a_real_answer() -> None:
    assert {fields["task"] for fields, _ in answers()} == {"flowers", "caltech101", "digits"}


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    digit = open_dataset("digits", 0).test[0].read()
    names: dict[str, object] = {"digit": digit, "flower": digit}
    block = blocks("python")[0]
    exec(block.replace("engine.predict", "results = engine.predict", 1), names)
    flower, written = names["results"]  # type: ignore[misc]
    assert (flower.task, written.task) == ("flowers", "digits")
    assert written.top(1)[0][0] == "5"


def test_the_clients_example_runs(shipped_server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    block = blocks("python")[1]
    image = tmp_path / "digit.png"
    image.write_bytes(open_dataset("digits", 0).test[0].read())
    block = block.replace("http://localhost:8000", shipped_server.url).replace("sunflower/image_0723.jpg", str(image))
    exec(block, {})
    shown = shipped_server.predict("flowers", image.read_bytes()).json()
    assert capsys.readouterr().out == f"{shown['predictions'][0]['label']} {shown['revision']}\n"
