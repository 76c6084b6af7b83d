"""Microns per pixel of a slide, and where the number comes from. Never guessed in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from saccade.errors import ConfigError

__all__ = ["LARGEST_MPP", "SMALLEST_MPP", "Resolution", "find_resolution", "given_resolution"]

SMALLEST_MPP, LARGEST_MPP = 0.05, 20.0  # what a scanner can have meant
MICRONS_PER_UNIT = {"centimeter": 1e4, "inch": 2.54e4}
MICRONS = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "um": 1.0, "nm": 1e-3}
ANISOTROPY = 0.01


@dataclass(frozen=True)
class Resolution:
    """Microns per pixel at level 0.

    Args:
        x: Along the width.
        y: Along the height.
        source: ``"given"``, the name of the property it was read from, or ``"objective-power"`` (10 / power).
    """

    x: float
    y: float
    source: str

    @property
    def is_anisotropic(self) -> bool:
        """Whether the axes differ by more than 1 %."""
        return abs(self.x / self.y - 1) > ANISOTROPY


def given_resolution(mpp: float | tuple[float, float]) -> Resolution:
    """Return a resolution that the user states.

    Raises:
        ConfigError: If it is not positive.
    """
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    if not (x > 0 and y > 0):
        raise ConfigError(f"The resolution of a slide must be positive microns per pixel; got {mpp}.")
    return Resolution(float(x), float(y), "given")


def find_resolution(properties: Mapping[str, str], ome_xml: str | None = None) -> tuple[Resolution | None, list[str]]:
    """Find the resolution in a slide's metadata.

    Tried in this order: ``openslide.mpp-x/y``, the vendors' own keys, TIFF resolution tags, ``PhysicalSizeX/Y`` of
    OME-XML, and the objective power (10 / power microns per pixel). Values outside 0.05 to 20 are no scanner's.

    Args:
        properties: As OpenSlide names them; values that are no numbers are passed over.
        ome_xml: Image description of an OME-TIFF.

    Returns:
        The resolution, or ``None``, and a sentence for each value that was found and not believed.
    """
    rejected: list[str] = []
    for x, y, source in candidates(properties, ome_xml):
        if all(SMALLEST_MPP <= value <= LARGEST_MPP for value in (x, y)):
            return Resolution(x, y, source), rejected
        rejected.append(f"{source} says {x:.4g} x {y:.4g} um/px, which no scanner has")
    return None, rejected


def candidates(properties: Mapping[str, str], ome_xml: str | None) -> Iterator[tuple[float, float, str]]:
    """Yield what the metadata says, best source first."""

    def pair(name_x: str, name_y: str, factor: float = 1.0) -> Iterator[tuple[float, float, str]]:
        x, y = number(properties.get(name_x)), number(properties.get(name_y))
        if x is not None and y is not None:
            yield x * factor, y * factor, name_x

    yield from pair("openslide.mpp-x", "openslide.mpp-y")
    yield from pair("aperio.MPP", "aperio.MPP")
    unit = properties.get("tiff.ResolutionUnit", "")
    per_unit = [number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY"]
    if unit in MICRONS_PER_UNIT and per_unit[0] and per_unit[1]:
        microns = MICRONS_PER_UNIT[unit]
        yield microns / per_unit[0], microns / per_unit[1], "tiff.XResolution"
    if ome_xml is not None:
        yield from ome_size(ome_xml)
    for name in ("openslide.objective-power", "aperio.AppMag", "hamamatsu.SourceLens"):
        power = number(properties.get(name))
        if power:
            yield 10 / power, 10 / power, "objective-power"


def ome_size(xml: str) -> Iterator[tuple[float, float, str]]:
    """Yield PhysicalSizeX and Y of the first image in an OME-XML document, in microns."""
    from xml.etree import ElementTree

    try:
        # Expat expands no external entities; a document with a DTD is not one that a scanner wrote.
        root = ElementTree.fromstring(xml) if "<!DOCTYPE" not in xml else None
    except ElementTree.ParseError:
        return
    pixels = None if root is None else root.find(".//{*}Pixels")
    if pixels is None:
        return
    sizes = [number(pixels.get(f"PhysicalSize{axis}")) for axis in "XY"]
    factors = [MICRONS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "XY"]
    if sizes[0] and sizes[1] and factors[0] and factors[1]:
        yield sizes[0] * factors[0], sizes[1] * factors[1], "OME PhysicalSizeX"


def number(text: str | None) -> float | None:
    """Return a finite number from a property's text, with a decimal comma if need be, or ``None``."""
    try:
        value = float((text or "").replace(",", "."))
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None
