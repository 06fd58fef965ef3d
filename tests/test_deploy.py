"""What is there to deploy with fits what it deploys: names of metrics, paths, options, packages."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from packaging.requirements import Requirement

from gpt_serve.cli.main import main
from gpt_serve.serve.metrics import Metrics
from gpt_serve.serve.state import ServerState

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "gpt-serve.json").read_text())
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
UNIT = (DEPLOY / "gpt-serve.service").read_text()


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match is not None
    return match[1]


def queries() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return panels + [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]


def exposed() -> dict[str, set[str]]:
    """The labels of each metric by the name that Prometheus stores, those that a scrape adds included."""
    registry = Metrics(ServerState(8)).registry
    found: dict[str, set[str]] = {}
    for collector, names in registry._collector_to_names.items():
        for name in names:
            found[name] = {*getattr(collector, "_labelnames", ()), "instance", "job", "le"}
    return found


@pytest.mark.parametrize("query", queries())
def test_the_dashboard_asks_for_metrics_that_there_are(query: str) -> None:
    names = re.findall(r"\bgpt_serve_\w+", query)
    assert names and set(names) <= set(exposed())
    used = set(re.findall(r"(\w+)=~?\"", query))
    for group in re.findall(r"by \(([^)]*)\)", query):
        used |= set(re.split(r",\s*", group))
    assert used <= set.union(*(exposed()[name] for name in names))


def test_the_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_grafana_finds_its_source_and_the_dashboard() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert {target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel["targets"]} == {
        source["uid"]
    }
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/gpt-serve.yaml").read_text())["providers"]
    mounts = dict(volume.split(":")[1::-1] for volume in COMPOSE["services"]["grafana"]["volumes"])
    assert mounts[provider["options"]["path"]] == "./deploy/grafana/dashboards"


def test_what_compose_mounts_is_there() -> None:
    sources = [volume.split(":")[0] for service in COMPOSE["services"].values() for volume in service["volumes"]]
    folders = [source for source in sources if source.startswith("./")]
    assert len(folders) >= 4 and all((ROOT / folder).exists() for folder in folders)
    assert {source for source in sources if not source.startswith("./")} == set(COMPOSE["volumes"])
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0][
        "targets"
    ]
    assert scraped == ["server:8000"] and "server" in COMPOSE["services"]


@pytest.mark.parametrize(
    "command",
    [
        json.loads(found("^ENTRYPOINT (.*)$", DOCKERFILE)) + json.loads(found("^CMD (.*)$", DOCKERFILE)),
        found("^ExecStart=(.*)$", UNIT).split(),
    ],
    ids=["Dockerfile", "systemd"],
)
def test_the_server_takes_the_options_that_it_is_started_with(command: list[str]) -> None:
    assert Path(command[0]).name == "gpt-serve" and command[1] == "serve"
    serve = main.get_command(click.Context(main), "serve")
    assert serve is not None
    serve.make_context("serve", command[2:], parent=click.Context(main))


def test_the_image_runs_without_privileges_and_reports_nothing() -> None:
    assert re.search(r"^USER 10001$", DOCKERFILE, re.M)
    assert "ORT_DISABLE_TELEMETRY=1" in DOCKERFILE
    grafana = COMPOSE["services"]["grafana"]["environment"]
    assert {grafana[name] for name in grafana if name.startswith(("GF_ANALYTICS", "GF_NEWS"))} == {"false"}


def test_stopping_takes_longer_than_draining() -> None:
    serve: Any = main.get_command(click.Context(main), "serve")
    drain = next(option.default for option in serve.params if option.name == "drain")
    assert int(found(r"^TimeoutStopSec=(\d+)$", UNIT)) > drain + 5
    assert int(COMPOSE["services"]["server"]["stop_grace_period"].removesuffix("s")) > drain + 5


@pytest.mark.parametrize(
    ("system", "machine", "package"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
        ("darwin", "x86_64", "onnxruntime"),
    ],
)
def test_every_machine_gets_one_onnxruntime_that_has_wheels_for_it(system: str, machine: str, package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = {"sys_platform": system, "platform_machine": machine}
    chosen = [
        requirement.name
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name.startswith("onnxruntime")
        and (requirement.marker is None or requirement.marker.evaluate(environment))
    ]
    assert chosen == [package]


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "Dockerfile"],
        ["promtool", "check", "config", "deploy/prometheus.yml"],
    ],
    ids=lambda command: command[0],
)
def test_the_tools_of_others_find_nothing_wrong(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    unit = tmp_path / "gpt-serve.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT, flags=re.M))
    run = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and not run.stderr, run.stderr
