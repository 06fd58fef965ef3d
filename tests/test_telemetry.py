"""Dependencies report nothing to their makers: no device id on disk, no name looked up."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
}
ENTRIES = {
    "command line": "import gpt_serve.cli.main, gpt_serve.export.session",
    "server": "import gpt_serve.serve.litserve, gpt_serve.engine.build, gpt_serve.engine.onnx",
    "export/run.py": "sys.path.insert(0, 'export'); import run",
}
PROGRAMS = ENTRIES | {"alone": "import onnxruntime"}
UPLOAD_SECONDS = 60  # onnxruntime by itself looks its host up some 10 to 30 s after it was imported


def start(program: str, home: Path, *before: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start ``program`` with an empty home folder and nothing in its environment that keeps dependencies quiet.

    In continuous integration (``CI``) onnxruntime reports nothing by itself.
    """
    quiet = (*SETTINGS, "XDG_CACHE_HOME", "CI")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT)} | variables
    command = [*before, sys.executable, "-c", f"import sys; {program}"]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(program: str, home: Path, **variables: str) -> None:
    process = start(program, home, **variables)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out.decode()


class Traced:
    """A program that goes on until it is stopped, and the names that it looks up meanwhile."""

    def __init__(self, program: str, home: Path) -> None:
        self.home, self.trace, self.ready = home, home / "trace", home / "ready"
        strace = ("strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmmsg", "-o", str(self.trace))
        self.process = start(f"{program}; open({str(self.ready)!r}, 'w'); import time; time.sleep(600)", home, *strace)

    def looked_up(self) -> list[str]:
        """Resolvers are asked over the network, or over a local socket of nscd or systemd."""
        return re.findall(r"AF_INET|nscd|resolve", self.trace.read_text())

    def stop(self) -> None:
        subprocess.run(["pkill", "-KILL", "-P", str(self.process.pid)], check=True)
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Traced]]:
    """All programs, begun before the other tests of this file, so that these take the time of waiting."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    programs = {name: Traced(program, tmp_path_factory.mktemp("home")) for name, program in PROGRAMS.items()}
    yield programs
    for program in programs.values():
        program.stop()


def device_ids(home: Path) -> list[Path]:
    return list(home.rglob("deviceid"))


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_every_dependency_reads_what_the_package_sets(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    pytest.importorskip("datasets")
    program = (
        "import gpt_serve, datasets, huggingface_hub.constants as hub; from ray._common.usage import usage_lib;"
        "assert hub.HF_HUB_DISABLE_TELEMETRY and not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS;"
        "assert not usage_lib.usage_stats_enabled()"
    )
    run(program, tmp_path)


@pytest.mark.parametrize("variable", SETTINGS)
def test_a_value_that_is_set_already_stays(variable: str, tmp_path: Path) -> None:
    run(f"import os, gpt_serve; assert os.environ[{variable!r}] == 'mine'", tmp_path, **{variable: "mine"})


def test_outside_the_package_it_is_set_before_onnxruntime_is_imported() -> None:
    """What imports `gpt_serve` first, or is imported by what does, has it from there."""
    for path in [*(ROOT / "export").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        before, imported, _ = path.read_text().partition("import onnxruntime")
        assert not imported or "ORT_DISABLE_TELEMETRY" in before or "gpt_serve" in before, path


@pytest.mark.slow
def test_no_name_is_looked_up_and_no_device_id_kept(traced: dict[str, Traced]) -> None:
    """Within the time in which onnxruntime by itself looks one up, and as much as a fifth more.

    It keeps an identifier of the device, too.
    """
    end = time.monotonic() + UPLOAD_SECONDS
    while not traced["alone"].looked_up() or not all(program.ready.exists() for program in traced.values()):
        assert time.monotonic() < end, "onnxruntime by itself has looked nothing up"
        time.sleep(0.2)
    newest = max(program.ready.stat().st_mtime for program in traced.values())
    taken = traced["alone"].trace.stat().st_mtime - traced["alone"].ready.stat().st_mtime
    time.sleep(max(0.0, newest + 1.2 * taken - time.time()))
    for name in ENTRIES:
        assert traced[name].process.poll() is None and traced[name].looked_up() == []
        assert device_ids(traced[name].home) == []
    assert device_ids(traced["alone"].home)
