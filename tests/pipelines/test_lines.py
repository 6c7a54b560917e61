"""Compressor lines as the table of versions says."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import delta, lines, tables
from pipelines.days import Days
from pipelines.errors import InputError

FIRST, NUM_DAYS = date(2026, 1, 1), 25
TABLE = tables.compressor_versions()


def write(lake: str, line: str, end: date, **more: Any) -> None:
    name = f"{line}@{end}"
    told = {"compressor_line": line, "compressor_version": name, "end": end, "domain": "shop"}
    row = {field.name: (told | more).get(field.name) for field in TABLE.schema}
    delta.replace(
        lake, TABLE, pa.Table.from_pylist([row], TABLE.schema), None, commit={"job": "test"},
        line=line, where=f"compressor_version = '{name}'",
    )  # fmt: skip


@pytest.fixture
def lake(tmp_path: Path) -> str:
    """A line with a version a day, and one that goes on later."""
    for number in range(NUM_DAYS):
        write(str(tmp_path), "user", FIRST + timedelta(days=number))
    write(str(tmp_path), "temporal", FIRST + timedelta(days=99))
    return str(tmp_path)


def test_a_line_is_its_newest_version_and_a_version_is_itself(lake: str) -> None:
    newest = FIRST + timedelta(days=NUM_DAYS - 1)
    assert lines.find(lake, "user")["end"] == newest
    assert lines.find(lake, f"user@{FIRST}")["end"] == FIRST
    write(lake, "user", FIRST + timedelta(days=3), status="again")
    assert lines.find(lake, "user")["end"] == newest
    with pytest.raises(
        InputError, match=f"no compressor version or line called 'users'.*user@{FIRST}"
    ):
        lines.find(lake, "users")


def test_files_of_versions_that_are_not_asked_for_are_not_opened(lake: str) -> None:
    days = Days(FIRST + timedelta(days=20), FIRST + timedelta(days=22))
    asked = [FIRST + timedelta(days=number) for number in (7, 21, 22, NUM_DAYS - 1)]
    opened = delta.open_table(lake, TABLE)
    told = pa.table(opened.get_add_actions(flatten=True)).to_pylist()
    assert len(told) == NUM_DAYS + 1
    for file in told:
        if file["max.end"] not in asked:
            Path(lake, TABLE.name, file["path"]).write_bytes(b"x" * file["size_bytes"])
    assert lines.find(lake, "user")["end"] == asked[-1]
    assert lines.find(lake, f"user@{asked[0]}")["end"] == asked[0]
    assert sorted(row["end"] for row in lines.ending(lake, "user", days)) == asked[1:3]


def test_a_table_is_opened_by_a_checkpoint_and_few_commits(lake: str) -> None:
    log = Path(lake, TABLE.name, "_delta_log")
    newest = max(int(path.stem) for path in log.glob("*.json"))
    checkpoint = max(int(path.name.split(".")[0]) for path in log.glob("*.checkpoint.parquet"))
    assert newest >= NUM_DAYS
    assert newest - checkpoint < 10
