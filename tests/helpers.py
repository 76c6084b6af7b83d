"""What several test files share: running the command line, tolerances, deterministic inputs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

# |got - expected| <= atol + rtol * |expected|, against a computation in at least float32.
TOLERANCES = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}


ARTEFACTS = Path(__file__).parents[1] / "build" / "test-artefacts"  # which git ignores


def keep_artefact(path: Path) -> Path:
    """Copy a file that a test made for people to look at to where it stays, and return the copy.

    That is ``SACCADE_TEST_ARTEFACTS``, or ``build/test-artefacts/`` in the checkout.
    """
    folder = Path(os.environ.get("SACCADE_TEST_ARTEFACTS") or ARTEFACTS)
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(path, folder / path.name))


def run_cli(
    *args: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    stdin: str | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run ``saccade ARGS`` in its own process and return exit code, stdout and stderr.

    Args:
        args: The command and its options.
        cwd: Working directory; ``None`` means this one.
        env: Variables added to this process's environment.
        stdin: Text for standard input; ``None`` means an empty one.
        timeout: Seconds until ``subprocess.TimeoutExpired``.
    """
    return subprocess.run(
        [sys.executable, "-m", "saccade.apps.cli", *map(str, args)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers that depend on ``shape`` and ``seed`` alone, whatever the global seed, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(got: Tensor, expected: Tensor, **tolerance: float) -> None:
    """Compare element-wise in float64, within the tolerance of ``got``'s dtype unless another is given."""
    limits = {**TOLERANCES[got.dtype], **tolerance}
    torch.testing.assert_close(got.detach().double().cpu(), expected.detach().double().cpu(), **limits)
