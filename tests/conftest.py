"""Session-wide set-up: Triton's interpreter where there is no GPU, and the real data."""

import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does; read when torch is imported

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: one thread in each, and in the commands they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Triton reads the variable when a module with jitted functions is imported; commands started by tests inherit it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with real images, slides and gaze recordings: SACCADE_TEST_DATA, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("SACCADE_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no real data: {root} is not a folder; set SACCADE_TEST_DATA to the folder that holds images/")
    return root
