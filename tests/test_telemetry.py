"""Dependencies report nothing to their makers: no device id on disk, no name looked up."""

import os
import re
import shutil
import subprocess
import sys
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
    "package": "import gpt_serve.engine.onnx",
    "command line": "import gpt_serve.cli.main, gpt_serve.export.session",
    "server": "import gpt_serve.serve.litserve, gpt_serve.engine.build, gpt_serve.engine.onnx",
    "export/run.py": "sys.path.insert(0, 'export'); import run",
}
UPLOAD_SECONDS = 40  # onnxruntime looks its host up some 10 to 30 s after it was imported


def run(program: str, home: Path, *before: str, **variables: str) -> None:
    """Run ``program`` with an empty home folder and nothing in its environment that keeps dependencies quiet.

    In continuous integration (``CI``) onnxruntime reports nothing by itself.
    """
    quiet = (*SETTINGS, "XDG_CACHE_HOME", "CI")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT)} | variables
    command = [*before, sys.executable, "-c", f"import sys; {program}"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, timeout=200)


def device_ids(home: Path) -> list[Path]:
    return list(home.rglob("deviceid"))


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_device_id_is_kept(entry: str, tmp_path: Path) -> None:
    run(ENTRIES[entry], tmp_path)
    assert device_ids(tmp_path) == []


def test_onnxruntime_by_itself_would_keep_one(tmp_path: Path) -> None:
    """Without this the tests above could not fail."""
    run("import onnxruntime", tmp_path)
    assert device_ids(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize(
    ("program", "looked_up"),
    [(ENTRIES["server"], False), (ENTRIES["export/run.py"], False), ("import onnxruntime", True)],
    ids=["server", "export/run.py", "onnxruntime by itself"],
)
def test_no_name_is_looked_up(program: str, looked_up: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    strace = ("strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmmsg", "-o", str(trace))
    run(f"{program}; import time; time.sleep({UPLOAD_SECONDS})", tmp_path, *strace)
    # Resolvers are asked over the network, or over a local socket of nscd or systemd.
    asked = re.findall(r"AF_INET|nscd|resolve", trace.read_text())
    assert bool(asked) is looked_up, asked


@pytest.mark.slow
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
