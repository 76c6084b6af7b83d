"""Copy the golden cases that have a runner from the full collection into ``tests/golden/data``.

    python -m tests.golden.trim [../shared/golden]

Rows with ``"commit": false`` stay out; their runner still judges them where SACCADE_GOLDEN_DIR points at the whole.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.golden.case import DATA, entries, is_entry_of, read_manifest
from tests.golden.runners import discover


def without(index: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an area's index without the entries of the given rows, wherever it keeps them."""

    def dropped(key: str, entry: Any) -> bool:
        return any(is_entry_of(row, key, entry) for row in rows)

    kept: dict[str, Any] = {}
    for key, value in index.items():
        if isinstance(value, list):
            kept[key] = [item for item in value if not dropped("", item)]
        elif isinstance(value, dict) and not dropped(key, value):
            kept[key] = {k: v for k, v in value.items() if not dropped(k, v)}
        elif not isinstance(value, dict):
            kept[key] = value
    return kept


def files(row: dict[str, Any], area: str, index: dict[str, Any]) -> set[str]:
    """Return the files of a row, as its manifest or the area's index names them."""
    named = {row["file"], row.get("json")}
    for key, entry in entries(index):
        if is_entry_of(row, key, entry) and "json" in entry:
            named.add(f"{area}/{entry['json']}")
    return {name for name in named if name is not None}


def trim(source: Path, target: Path, words: set[str]) -> list[str]:
    """Replace ``target`` by the part of ``source`` whose runner word is in ``words``; return the ids kept."""
    manifest = read_manifest(source)
    kept = [row for row in manifest["cases"] if row["runner"] in words and row.get("commit", True)]
    shutil.rmtree(target, ignore_errors=True)
    for area in {row["id"].partition("/")[0] for row in kept}:
        rows = [row for row in manifest["cases"] if row["id"].startswith(area + "/")]
        index = json.loads((source / area / "index.json").read_text(encoding="utf-8"))
        write(target / area / "index.json", without(index, [row for row in rows if row not in kept]))
        names = {name for row in rows if row in kept for name in files(row, area, index)}
        beside = {str(Path(name).with_suffix(".safetensors")) for name in names}  # tensors that a JSON file describes
        for name in names | {name for name in beside if (source / name).exists()}:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    write(target / "manifest.json", {**manifest, "cases": kept})
    return [row["id"] for row in kept]


def write(path: Path, document: Any) -> None:
    """Write indented JSON, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    collection = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA.parents[3] / "shared" / "golden"
    print(*trim(collection, DATA, set(discover())), sep="\n")
