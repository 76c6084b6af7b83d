"""Every shipped kernel compiles ahead of time for sm_80 and sm_90, within shared memory and its stated spills."""

import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saccade.attention.kernels as kernels
from tests.conftest import REPOSITORY

FILES = [module.name for module in pkgutil.iter_modules(kernels.__path__) if module.name != "runtime"]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block may have


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", FILES)
def test_builds(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.aot", name],
        cwd=REPOSITORY,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["sm"] for row in rows} == {80, 90}
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT[row["sm"]], row
        assert row["spill_bytes"] <= row["allowed"], row


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", FILES)
def test_every_kernel_is_built(name):
    """A kernel that no build names would never be compiled before a user's first call."""
    text = (Path(kernels.__path__[0]) / f"{name}.py").read_text(encoding="utf-8")
    defined = re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", text)
    builds = importlib.import_module(f"saccade.attention.kernels.{name}").BUILDS
    assert {build.kernel.__name__ for build in builds} == set(defined)
