"""Delta tables in DuckDB."""

from __future__ import annotations

import duckdb
import pyarrow.dataset as ds
from pyarrow.fs import PyFileSystem


def register(connection: duckdb.DuckDBPyConnection, name: str, files: ds.FileSystemDataset) -> None:
    """A table's files (`delta.files`) as the view `name`.

    Where every read asks Python, as in an object store, DuckDB gets one thread: with more it waits
    for ever in about one run of a hundred.
    """
    if isinstance(files.filesystem, PyFileSystem):
        connection.execute("SET threads = 1")
    connection.register(name, files)
