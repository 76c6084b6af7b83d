"""Where and how a run computes: device, precision, seeds, versions."""

from __future__ import annotations

import os
import platform
import random
from importlib import metadata
from typing import TYPE_CHECKING

from saccade.errors import ConfigError, MissingResourceError

if TYPE_CHECKING:
    import torch

__all__ = ["resolve_device", "resolve_precision", "seed_everything", "versions"]


def resolve_device(name: str) -> torch.device:
    """Turn ``"auto"``, ``"cpu"``, ``"cuda:1"`` ... into a device that is there.

    Raises:
        ConfigError: If torch does not know such a device.
        MissingResourceError: If the device is not on this machine; there is no silent fall-back.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"Unknown device {name!r}. Use auto, cpu, cuda, cuda:N or mps.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MissingResourceError(
            f"Device {name!r} is not on this machine ({torch.cuda.device_count()} CUDA devices). Pass --device auto."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MissingResourceError("Device 'mps' is not on this machine. Pass --device auto.")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products: ``"auto"`` is bf16 on GPUs that have it, else fp32."""
    import torch

    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; ``deterministic`` also forbids algorithms that vary between runs."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    names = ("saccade", "torch", "torchvision", "timm", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
