"""One engine for every batch command: items in, atomic files out, resumable after any crash."""

from saccade.batch.environment import resolve_device, resolve_precision, seed_everything
from saccade.batch.items import IMAGE_EXTENSIONS, Item, find_items
from saccade.batch.merge import merge_shards
from saccade.batch.options import BatchOptions
from saccade.batch.outputs import ArrayOutput
from saccade.batch.run import Run, RunSummary
from saccade.batch.tables import atomic_path, write_table

__all__ = [
    "IMAGE_EXTENSIONS",
    "ArrayOutput",
    "BatchOptions",
    "Item",
    "Run",
    "RunSummary",
    "atomic_path",
    "find_items",
    "merge_shards",
    "resolve_device",
    "resolve_precision",
    "seed_everything",
    "write_table",
]
