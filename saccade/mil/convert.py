"""Official MIL checkpoints rewritten as safetensors, every key accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from saccade import __version__
from saccade.batch import atomic_path
from saccade.checkpoints import KeyReport, file_sha256, match_keys, read_state_dict
from saccade.errors import CheckpointError, ConfigError
from saccade.mil.loading import build, translate
from saccade.mil.model import REGISTRY

__all__ = ["MILConversion", "convert_aggregator"]


@dataclass(frozen=True)
class MILConversion:
    """What a conversion wrote.

    Args:
        model: Name of the model.
        feature_dim: Width of its bags.
        num_classes: Number of its logits.
        report: How the keys fit; complete.
        dropped: Keys of the file that are no weights of the model (labels that CLAM's instance loss keeps).
    """

    model: str
    feature_dim: int
    num_classes: int
    report: KeyReport
    dropped: tuple[str, ...]


def convert_aggregator(
    source: str | Path, *, model: str | None = None, out: str | Path, overwrite: bool = False
) -> MILConversion:
    """Write a trained aggregator of ACMIL, CLAM, TransMIL, DSMIL or MIL-Lab as safetensors for ``load_classifier``.

    Architecture and sizes follow from the weights; see :func:`saccade.mil.load_model`. The names of the keys are the
    official ones, MIL-Lab's become those of ACMIL's repository. The metadata holds ``model``, ``source_sha256`` and
    ``saccade_version``.

    Args:
        source: ``.pth``, ``.pt``, ``.ckpt`` or ``.safetensors``.
        model: Name of the model that the weights must belong to; ``None`` takes what they say.
        out: ``*.safetensors``.
        overwrite: Replace ``out`` if it exists.

    Raises:
        ConfigError: If a file cannot be used, or ``out`` exists.
        CheckpointError: If the weights are another model's, or a key is missing, unexpected or of another shape (the
            message lists them all); nothing is written then.
    """
    path = Path(out)
    if path.suffix != ".safetensors":
        raise ConfigError(f"The output must end in .safetensors, got {path.name!r}.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; choose another name, or replace it with --overwrite.")
    state, dropped = translate(read_state_dict(source))
    network = build(state, source=source)
    name = next(name for name, kind in REGISTRY.items() if kind is type(network))
    if model not in (None, name):
        raise CheckpointError(f"The weights in {source} are those of {name}, not of {model}; nothing was written.")
    report = match_keys(state, network)
    if not report.complete:
        raise CheckpointError(f"The weights in {source} do not fit {name}; nothing was written.\n{report.details()}")
    metadata = {"format": "pt", "model": name, "source_sha256": file_sha256(source), "saccade_version": __version__}
    with atomic_path(path) as temporary:
        save_file({key: value.contiguous().clone() for key, value in state.items()}, temporary, metadata)
    return MILConversion(name, network.feature_dim, network.num_classes, report, tuple(dropped))
