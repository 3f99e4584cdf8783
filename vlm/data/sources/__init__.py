"""Where examples come from: rows of JSON, tar shards, `datasets` tables, lists, drawn scenes.

Every source is map-style: it knows its length and gives any row by number, so that a position in
training is one integer (see `vlm.data.mixture`). Opening one builds a small index (byte offsets);
rows stay on disk until they are asked for, and images stay encoded.
"""

from vlm.data.example import BadSource
from vlm.data.sources.base import ListSource, Source
from vlm.data.sources.clip_benchmark import ClipBenchmark
from vlm.data.sources.coco import CocoSource
from vlm.data.sources.json_rows import RowsSource
from vlm.data.sources.lists import TsvSource
from vlm.data.sources.row import RowFormat, example_from_row
from vlm.data.sources.shards import ShardSource
from vlm.data.sources.spec import open_source
from vlm.data.sources.tables import TableSource

__all__ = [
    "BadSource",
    "ClipBenchmark",
    "CocoSource",
    "ListSource",
    "RowFormat",
    "RowsSource",
    "ShardSource",
    "Source",
    "TableSource",
    "TsvSource",
    "example_from_row",
    "open_source",
]
