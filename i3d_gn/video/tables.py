"""Rows of results as a CSV, JSON or Parquet file, by its name."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from i3d_gn.files import atomic_output, write_json

TABLE_SUFFIXES = (".csv", ".json", ".parquet")


def write_table(path: Path, schema: pa.Schema, rows: Sequence[dict[str, Any]]) -> None:
    """Write `rows` with the columns of `schema`, atomically; missing values are null or empty."""
    complete = [{name: row.get(name) for name in schema.names} for row in rows]
    if path.suffix == ".json":
        write_json(path, complete)
        return
    with atomic_output(path) as temporary:
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(complete, schema=schema), temporary)
            return
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, schema.names)
            writer.writeheader()
            writer.writerows(complete)
