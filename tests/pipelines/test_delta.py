"""A table's files: those of the days asked for, read without Python or by one thread of DuckDB."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyarrow.fs import PyFileSystem

from pipelines import delta, duck
from pipelines.days import Days

DAYS = [date(2026, 1, 1) + timedelta(days=n) for n in range(6)]


def test_no_read_of_a_local_file_waits_for_python(tmp_path: Path) -> None:
    place = tmp_path / "a lake's ü"
    names = ["plain", "with space", "with/slash", "100%", "e%20f", "ü:x"]
    rows = pa.table({"name": names, "value": range(len(names))})
    write_deltalake(place, rows, partition_by=["name"])
    found = delta.files(DeltaTable(place))
    assert not isinstance(found.filesystem, PyFileSystem)
    assert found.to_table().sort_by("value").to_pydict() == rows.to_pydict()
    connection = duckdb.connect(config={"threads": 2})
    duck.register(connection, "t", found)
    assert threads_of(connection) == 2
    assert connection.sql("SELECT sum(value) FROM t").fetchall() == [(15,)]
    assert all(info.is_file for info in found.filesystem.get_file_info(found.files))


@pytest.mark.parametrize("asked", [Days(DAYS[2], DAYS[4]), [DAYS[3], DAYS[2]]])
def test_files_of_days_not_asked_for_are_never_seen(tmp_path: Path, asked: Any) -> None:
    """Each would cost a pyarrow fragment: a day of a long table more than one of a short one."""
    rows = pa.table({"event_date": DAYS * 2, "value": range(12)})
    write_deltalake(tmp_path / "t", rows, partition_by=["event_date"])
    found = delta.files(DeltaTable(tmp_path / "t"), asked)
    assert {Path(file).parent.name for file in found.files} == {
        f"event_date={day}" for day in DAYS[2:4]
    }
    assert sorted(found.to_table()["value"].to_pylist()) == [2, 3, 8, 9]
    assert len(delta.files(DeltaTable(tmp_path / "t")).to_table()) == 12
    write_deltalake(tmp_path / "whole", rows)
    with pytest.raises(ValueError, match="not partitioned by event_date"):
        delta.files(DeltaTable(tmp_path / "whole"), asked)


def test_where_python_is_asked_duckdb_has_one_thread(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "t", pa.table({"value": [1, 2]}))
    connection = duckdb.connect(config={"threads": 2})
    duck.register(connection, "t", DeltaTable(tmp_path / "t").to_pyarrow_dataset())
    assert threads_of(connection) == 1
    assert connection.sql("SELECT sum(value) FROM t").fetchall() == [(3,)]


def threads_of(connection: duckdb.DuckDBPyConnection) -> int:
    found = connection.sql("SELECT current_setting('threads')").fetchall()
    return int(found[0][0])
