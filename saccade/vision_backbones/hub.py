"""Models that live in a folder or on the Hugging Face hub: which library reads them, and what to say when it cannot."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from saccade.errors import CheckpointError, ConfigError, MissingResourceError, SaccadeError

__all__ = ["go_offline_if_unreachable", "library_of", "unusable"]

PORTS = {"http": 80, "https": 443}


def library_of(name: str) -> str:
    """Return ``"timm"`` or ``"open_clip"`` for a ``local-dir:`` or ``hf-hub:`` name, by the configuration found there.

    A ``config.json`` that names an architecture is timm's. Repositories of open_clip often hold another ``config.json``
    beside ``open_clip_config.json``, so its presence alone decides nothing.

    Raises:
        ConfigError: If neither configuration is there.
        MissingResourceError: If a hub repository is not in the cache and cannot be reached.
    """
    source, _, place = name.partition(":")
    if source == "hf-hub":
        go_offline_if_unreachable()
    reasons: list[Exception] = []

    def fetch(file: str) -> Path | None:
        if source == "local-dir":
            path = Path(place, file)
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download

        repository, _, revision = place.partition("@")
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except (OSError, ValueError) as error:  # not there, not cached, not reachable, not a repository name
            reasons.append(error)
            return None

    config = fetch("config.json")
    if config is not None and names_architecture(config):
        return "timm"
    if fetch("open_clip_config.json") is not None:
        return "open_clip"
    if config is None and reasons:
        raise unusable(name, reasons[0])
    raise ConfigError(
        f'{name} holds neither timm\'s config.json (with an "architecture") nor open_clip_config.json. '
        "Folders written by timm.models.save_for_hf and open_clip's push_to_hf_hub hold one."
    )


def names_architecture(config: Path) -> bool:
    """Tell whether a ``config.json`` is timm's."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{config} is not JSON: {error}.") from error
    return isinstance(content, dict) and "architecture" in content


def unusable(name: str, error: Exception) -> SaccadeError:
    """Return what to raise for a model that could not be loaded.

    Args:
        name: The name as the user gave it.
        error: What the library said.

    Returns:
        A CheckpointError if the weights were there and do not fit, a MissingResourceError if they are not there.
    """
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if name.startswith("local-dir:") or "loading state_dict" in reason:
        return CheckpointError(f"Model {name!r} cannot be loaded ({reason}).")
    return MissingResourceError(
        f"Model {name!r} is not in the local cache and cannot be downloaded ({reason}). "
        "Download it elsewhere and pass --model local-dir:PATH or --weights FILE."
    )


def go_offline_if_unreachable(seconds: float = 1.0) -> None:
    """Tell huggingface_hub to use its cache alone when the hub does not answer, instead of retrying for a minute.

    Args:
        seconds: How long to wait for the hub, or for the proxy that the environment names.
    """
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    address = urlsplit(getproxies().get(hub.scheme, constants.ENDPOINT))
    answered: list[bool] = []

    def probe() -> None:
        try:
            port = address.port or PORTS.get(address.scheme, 443)
            socket.create_connection((address.hostname or "", port), timeout=seconds).close()
            answered.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=probe, daemon=True)  # name resolution has no time limit of its own
    thread.start()
    thread.join(seconds)
    if not answered:
        constants.HF_HUB_OFFLINE = True
