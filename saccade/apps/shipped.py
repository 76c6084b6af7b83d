"""The configuration files that come with saccade, named ``group/name``; imports no torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from saccade.errors import ConfigError, suggest

__all__ = ["config_path", "list_configs"]

FOLDER = Path(str(resources.files("saccade.apps"))) / "configs"


def list_configs() -> list[str]:
    """Return the names of all shipped configs, sorted."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.yaml"))


def config_path(name: str | Path) -> Path:
    """Find a config by path or shipped name.

    Args:
        name: An existing file, or e.g. ``"image/flowers_resnet10"``.

    Returns:
        The file.

    Raises:
        ConfigError: If there is neither; the message suggests close names.
    """
    if Path(name).is_file():
        return Path(name)
    known = list_configs()
    if str(name) in known:
        return FOLDER / f"{name}.yaml"
    raise ConfigError(
        f"Config {str(name)!r} is neither a file nor a shipped name.{suggest(str(name), known)} "
        "All names: saccade config ls."
    )
