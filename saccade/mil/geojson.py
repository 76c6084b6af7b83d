"""Tissue and tiles as GeoJSON that QuPath opens, and QuPath's edits back as tissue."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.batch.tables import atomic_path
from saccade.errors import DataError
from saccade.mil.slide import Slide
from saccade.mil.tissue import Polygon, Tissue, rasterize

__all__ = ["read_polygons", "tissue_from_geojson", "write_polygons", "write_tiles"]

NAMESPACE = uuid.UUID("6f3d3b0e-0f3c-4b0e-9c55-7361636d696c")  # ids follow from the content, so that reruns are equal
COLORS = {"tissue": (0, 160, 80), "tile": (60, 120, 220)}
LARGEST_FILE = 512 << 20  # bytes; a drawing larger than this is not one


def write_polygons(path: str | Path, polygons: Iterable[Polygon], *, source: str = "") -> None:
    """Write outlines as annotations, in level-0 pixels rounded to whole ones.

    Args:
        path: ``*.geojson``; replaced as a whole.
        polygons: In level-0 pixels.
        source: How the tissue was found; :func:`tissue_from_geojson` gives it back for as long as nothing is edited.
    """
    features = [
        feature(
            {"type": "Polygon", "coordinates": [closed(ring) for ring in (p.exterior, *p.holes)]}, p.name, "annotation"
        )
        for p in polygons
    ]
    write(path, features, {"saccade": {"source": source, "id": digest(features)}} if source else {})


def write_tiles(
    path: str | Path,
    coords: NDArray[Any],
    width: float,
    height: float,
    measurements: Mapping[str, Sequence[float] | NDArray[Any]] | None = None,
) -> None:
    """Write tiles as QuPath tile objects, which stay quick by the thousand.

    Args:
        path: ``*.geojson``; replaced as a whole.
        coords: ``(N, 2)``, top-left corners in level-0 pixels.
        width: Of a tile in level-0 pixels.
        height: Likewise.
        measurements: Numbers of each tile by name, e.g. ``{"Attention": ...}``.
    """
    features = []
    for index, (x, y) in enumerate(np.asarray(coords).tolist()):
        ring = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])
        one = feature({"type": "Polygon", "coordinates": [closed(ring)]}, "tile", "tile")
        one["properties"]["measurements"] = {name: float(v[index]) for name, v in (measurements or {}).items()}
        features.append(one)
    write(path, features)


def feature(geometry: dict[str, Any], name: str, kind: str) -> dict[str, Any]:
    """Return a GeoJSON feature with QuPath's properties."""
    color = list(COLORS.get(name, COLORS["tissue"]))
    properties = {
        "objectType": kind,
        "name": name,
        "classification": {"name": name, "color": color},
        "isLocked": False,
    }
    identity = uuid.uuid5(NAMESPACE, json.dumps([kind, name, geometry]))
    return {"type": "Feature", "id": str(identity), "geometry": geometry, "properties": properties}


def closed(ring: NDArray[np.float64]) -> list[list[int]]:
    """Return a ring with whole coordinates, its first point repeated at the end; of four points at least."""
    points: list[list[int]] = np.round(ring).astype(np.int64).tolist()
    return [*points, *points[-1:] * (3 - len(points)), points[0]]


def digest(features: list[Any]) -> str:
    """Return a word that changes with any feature."""
    return str(uuid.uuid5(NAMESPACE, json.dumps(features)))


def write(path: str | Path, features: list[dict[str, Any]], more: Mapping[str, Any] | None = None) -> None:
    """Write a collection of features, and members that are not GeoJSON's own."""
    with atomic_path(Path(path)) as temporary:
        collection = {"type": "FeatureCollection", **(more or {}), "features": features}
        temporary.write_text(json.dumps(collection), encoding="utf-8")


def read_polygons(path: str | Path) -> tuple[Polygon, ...]:
    """Read polygons from GeoJSON: a collection, a list of features, one feature or a bare geometry.

    Features that QuPath marks as tiles or detections are passed over, and so are points and lines.

    Args:
        path: The file, in level-0 pixels.

    Raises:
        DataError: If it is no GeoJSON, or a ring is no list of finite points; ``reason="bad_geojson"``.
    """
    return polygons_in(read_document(path), Path(path))


def read_document(path: str | Path) -> Any:  # noqa: ANN401 - parsed JSON
    """Return the JSON of a file; see :func:`read_polygons`."""
    file = Path(path)
    if file.stat().st_size > LARGEST_FILE:
        raise DataError(f"{file} has more than {LARGEST_FILE >> 20} MiB; it is no drawing.", reason="bad_geojson")
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON ({error}).", reason="bad_geojson") from error


def polygons_in(document: Any, file: Path) -> tuple[Polygon, ...]:  # noqa: ANN401 - parsed JSON
    """Return the polygons of a document; see :func:`read_polygons`."""
    return tuple(
        polygon
        for number, (geometry, name) in enumerate(geometries(document, file), start=1)
        for polygon in parse(geometry, name, f"{file}, feature {number}")
    )


def source_in(document: Any) -> str:  # noqa: ANN401 - parsed JSON
    """Return how the tissue of a file was found: what saccade wrote, or ``"geojson"`` if anything was edited."""
    note = document.get("saccade") if isinstance(document, dict) else None
    features = document.get("features") if isinstance(document, dict) else None
    is_ours = isinstance(note, dict) and isinstance(features, list) and note.get("id") == digest(features)
    return str(note.get("source")) if is_ours and isinstance(note, dict) else "geojson"


def geometries(document: Any, file: Path) -> Iterator[tuple[Any, str]]:  # noqa: ANN401 - parsed JSON
    """Yield geometries and names."""
    if isinstance(document, dict) and document.get("type") == "FeatureCollection":
        document = document.get("features")
    if isinstance(document, dict):
        document = [document]
    if not isinstance(document, list):
        raise DataError(
            f"{file} is no GeoJSON: expected features, got {type(document).__name__}.", reason="bad_geojson"
        )
    for item in document:
        if not isinstance(item, dict):
            raise DataError(f"{file} is no GeoJSON: a feature is a {type(item).__name__}.", reason="bad_geojson")
        properties = item.get("properties") or {}
        if isinstance(properties, dict) and properties.get("objectType") in ("tile", "detection", "cell"):
            continue
        labels = properties.get("classification") if isinstance(properties, dict) else None
        name = labels.get("name") if isinstance(labels, dict) else None
        yield item.get("geometry") if item.get("type") == "Feature" else item, str(name or "tissue")


def parse(geometry: Any, name: str, place: str) -> Iterator[Polygon]:  # noqa: ANN401 - parsed JSON
    """Yield the polygons of a geometry."""
    if not isinstance(geometry, dict):
        return
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind == "GeometryCollection":
        for part in listed(geometry.get("geometries"), place):
            yield from parse(part, name, place)
    elif kind in ("Polygon", "MultiPolygon"):
        for rings in [coordinates] if kind == "Polygon" else listed(coordinates, place):
            if not isinstance(rings, list) or not rings:
                raise DataError(f"{place}: a polygon has no rings.", reason="bad_geojson")
            exterior, *holes = (parse_ring(ring, place) for ring in rings)
            yield Polygon(exterior, tuple(holes), name)


def listed(parts: Any, place: str) -> list[Any]:  # noqa: ANN401 - parsed JSON
    """Return the parts of a geometry, of which there may be none."""
    if parts is not None and not isinstance(parts, list):
        raise DataError(f"{place}: expected a list of parts, got {type(parts).__name__}.", reason="bad_geojson")
    return parts or []


def parse_ring(ring: Any, place: str) -> NDArray[np.float64]:  # noqa: ANN401 - parsed JSON
    """Return a ring ``(P, 2)`` without its repeated end."""
    try:
        points = np.array([[float(point[0]), float(point[1])] for point in ring]).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError, IndexError, KeyError) as error:
        raise DataError(f"{place}: a ring is no list of points ({error}).", reason="bad_geojson") from error
    if not np.isfinite(points).all() or np.abs(points).max(initial=0) > 2**40:
        raise DataError(f"{place}: a ring has coordinates that are no pixels.", reason="bad_geojson")
    if len(points) > 1 and (points[0] == points[-1]).all():
        points = points[:-1]
    if len(points) < 3:
        raise DataError(f"{place}: a ring has {len(points)} points, expected 3 or more.", reason="bad_geojson")
    return points


def tissue_from_geojson(path: str | Path, slide: Slide, *, mpp: float = 8.0) -> Tissue:
    """Return the tissue that a GeoJSON file draws on a slide.

    Its source is ``"geojson"``, or what :func:`write_polygons` was told if the file is as it was written.

    Args:
        path: The file, in level-0 pixels; parts outside the slide are cut off.
        slide: The slide.
        mpp: Resolution of the mask in microns per pixel.

    Raises:
        DataError: As :func:`read_polygons`; or if there are polygons and the slide's resolution is not known.
    """
    document = read_document(path)
    polygons = polygons_in(document, Path(path))
    if slide.resolution is None and not polygons:
        return Tissue(np.zeros((1, 1), bool), slide.width, slide.height, (), source_in(document))
    resolution = slide.require_resolution()
    scale_x, scale_y = max(1.0, mpp / resolution.x), max(1.0, mpp / resolution.y)
    shape = (max(1, math.ceil(slide.height / scale_y)), max(1, math.ceil(slide.width / scale_x)))
    mask = rasterize(polygons, shape, scale_x, scale_y)
    return Tissue(mask, scale_x, scale_y, polygons, source_in(document))
