"""``make gpu`` is for a machine that has a GPU and few packages: what it imports must not grow unnoticed."""

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = {"torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "cachetools", "filelock", "click", "tqdm"}
NEEDED |= {"onnxruntime-gpu", "scikit-learn", "matplotlib", "pytest"}
"""Of this project's requirements, those that ``make gpu`` needs."""


def names(requirements: Iterable[str]) -> set[str]:
    """Of what is required without an extra being asked for."""
    plain = (line for line in requirements if "extra ==" not in line)
    return {re.split(r"[\[<>=!;~( ]", line)[0].lower() for line in plain}


def with_their_own(packages: set[str]) -> set[str]:
    """``packages`` and all that they require."""
    found: set[str] = set()
    while new := packages - found:
        found |= new
        for package in new:
            with suppress(PackageNotFoundError):  # it is for another platform
                packages = packages | names(requires(package) or [])
    return found


def modules_of_the_others() -> list[str]:
    """The modules of all other requirements, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    others = names([*project["dependencies"], *(line for extra in extras for line in extra)]) - with_their_own(NEEDED)
    return sorted(
        module
        for module, distributions in packages_distributions().items()
        if {name.lower() for name in distributions} & others
    )


@pytest.mark.slow
def test_it_imports_only_what_such_a_machine_has() -> None:
    blocked = modules_of_the_others()
    assert {"fastapi", "litserve", "onnx_ir", "onnxscript", "uvicorn"} <= set(blocked)
    program = f"""
        import sys
        sys.modules |= dict.fromkeys({blocked!r})  # importing one is an ImportError
        import pytest
        import gpt_serve.bench, gpt_serve.cli.main
        sys.exit(pytest.main(["--confcutdir=tests/gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"]))
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_the_host_never_waits_inside_a_pass" in done.stdout
