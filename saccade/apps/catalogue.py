"""The models of ``saccade list models``, known without importing torch.

A saccade backbone appears there by one entry in ``MODELS``; a test compares the entries with what is registered.
timm's names are read from the sources of the installed timm. Their sizes come from ``timm_models.csv``, which
``python -m saccade.apps.catalogue`` writes anew after an upgrade of timm; a name not in it is listed without them.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import util
from pathlib import Path

from saccade.errors import ConfigError, suggest

__all__ = ["MODELS", "Model", "find_models", "timm_names", "write_timm_table"]

TIMM_TABLE = Path(__file__).with_name("timm_models.csv")
ENTRY_POINT = re.compile(r"^@register_model\s*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Model:
    """One line of the list.

    Args:
        name: Registered name, for ``-m`` and ``timm.create_model``; with the tag of its weights where those are listed.
        params: Number of weights with the default classifier; ``None`` if not known.
        input: Input height and width in pixels, ``"224"`` or ``"1024x768"``; ``None`` if not known.
        task: What it is made for.
        source: Paper and venue, or ``"timm"``.
        verified: What tests compare with the official code: ``golden`` outputs, ``grad`` gradients, ``keys`` checkpoint
            keys.
        library: ``"saccade"`` or ``"timm"``.
    """

    name: str
    params: int | None = None
    input: str | None = None
    task: str = "image"
    source: str = "timm"
    verified: str = ""
    library: str = "timm"


BIFORMER = {
    "biformer_base": 56_804_968,
    "biformer_small": 25_536_232,
    "biformer_stl": 28_372_552,
    "biformer_stl_nchw": 28_372_552,
    "biformer_tiny": 13_142_760,
}
# Parameters as trained; OverLoCK has 3 % fewer after merging the branches of its convolutions.
OVERLOCK = {"overlock_b": 97_434_816, "overlock_s": 57_795_748, "overlock_t": 34_476_448, "overlock_xt": 16_969_600}
# Without and with token-aware average pooling (tap_).
FAN = {
    "fan_tiny_12_p16_224": (7_319_920, 7_404_688),
    "fan_small_12_p16_224": (28_345_336, 28_513_048),
    "fan_base_18_p16_224": (54_350_320, 54_643_360),
    "fan_large_24_p16_224": (80_574_100, 80_992_468),
    "fan_tiny_8_p4_hybrid": (7_467_240, 7_523_752),
    "fan_small_12_p4_hybrid": (26_117_944, 26_257_704),
    "fan_base_16_p4_hybrid": (50_475_048, 50_735_528),
    "fan_large_16_p4_hybrid": (76_855_140, 77_238_644),
    "fan_Xlarge_16_p4_hybrid": (120_407_316, 120_873_916),
}
RVT = {
    "rvt_tiny": (8_646_376, 8_744_968),
    "rvt_tiny_plus": (10_951_336, 11_049_928),
    "rvt_small": (22_148_392, 22_316_104),
    "rvt_small_plus": (23_300_872, 23_468_584),
    "rvt_base": (86_223_784, 87_091_912),
    "rvt_base_plus": (88_528_744, 89_396_872),
}
SOURCES: tuple[tuple[str, dict[str, int]], ...] = (
    ("BiFormer, CVPR 2023", BIFORMER),
    ("OverLoCK, CVPR 2025", OVERLOCK),
    ("FAN, ICML 2022", {name: plain for name, (plain, _) in FAN.items()}),
    ("RVT, CVPR 2022", {name: plain for name, (plain, _) in RVT.items()}),
    ("TAP, ICCV 2023", {f"tap_{name}": pooled for name, (_, pooled) in (FAN | RVT).items()}),
)

MODELS: tuple[Model, ...] = tuple(
    Model(name, params, "224", source=source, verified="golden grad keys", library="saccade")
    for source, family in SOURCES
    for name, params in family.items()
)


def find_models(pattern: str = "*", *, library: str = "all", pretrained: bool = False) -> list[Model]:
    """Return the models whose name matches, in natural order.

    Args:
        pattern: Shell pattern as in ``timm.list_models``.
        library: ``"saccade"``, ``"timm"`` or ``"all"``.
        pretrained: Only weights that can be downloaded, one entry per tag (``NAME.TAG``). Imports timm.

    Raises:
        ConfigError: If none matches; the message suggests close names.
    """
    models = [*MODELS, *timm_models()]
    if pretrained:
        models = with_weights(models)
    models = [model for model in models if library in ("all", model.library)]
    found = [model for model in models if fnmatchcase(model.name, pattern)]
    if pretrained:
        found += [model for model in models if fnmatchcase(model.name, f"{pattern}.*") and model not in found]
    if not found:
        names = [model.name for model in models]
        raise ConfigError(f"No model matches {pattern!r}.{suggest(pattern.strip('*'), names)}")
    return sorted(found, key=lambda model: natural_key(model.name))


def timm_models() -> list[Model]:
    """Return timm's models under the names of the installed version."""
    with TIMM_TABLE.open(encoding="utf-8", newline="") as stream:
        sizes = {row["name"]: row for row in csv.DictReader(stream)}
    return [
        Model(name, int(sizes[name]["params"]), sizes[name]["input"]) if name in sizes else Model(name)
        for name in timm_names()
    ]


def timm_names() -> list[str]:
    """Return the names that the installed timm registers, read from its sources."""
    spec = util.find_spec("timm")
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    files = [file for folder in folders for file in sorted(Path(folder, "models").glob("*.py"))]
    return [name for file in files for name in ENTRY_POINT.findall(file.read_text(encoding="utf-8"))]


def with_weights(models: list[Model]) -> list[Model]:
    """Return one entry per tag with weights; the input size is that of the tag."""
    import timm

    import saccade.vision_backbones  # noqa: F401 - registers our own

    known = {model.name: model for model in models}
    return [
        replace(known.get(name.partition(".")[0], Model(name)), name=name, input=input_size(name))
        for name in timm.list_pretrained()
    ]


def input_size(name: str) -> str:
    """Return timm's input size of a model as it is listed."""
    import timm

    _, height, width = timm.models.get_pretrained_cfg(name, allow_unregistered=False).input_size
    return str(height) if height == width else f"{height}x{width}"


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort ``b2`` before ``b10``, as timm does."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name.lower())]


def write_timm_table(names: list[str], path: Path) -> None:
    """Measure timm models and write ``name, params, input``; builds each without memory for its weights.

    Args:
        names: Registered names.
        path: CSV file.
    """
    import timm
    import torch

    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["name", "params", "input"])
        for name in sorted(names, key=natural_key):
            with torch.device("meta"):
                model = timm.create_model(name)
            writer.writerow([name, sum(p.numel() for p in model.parameters()), input_size(name)])


if __name__ == "__main__":
    write_timm_table(timm_names(), TIMM_TABLE)
