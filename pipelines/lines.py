"""Compressor lines and versions as their rows in the lake say, without their weights."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipelines import delta, tables
from pipelines.days import Days
from pipelines.errors import InputError


def find(lake: str, name: str) -> dict[str, Any]:
    """The newest row of the version or, given a line, of the line's newest version."""
    matching = _rows(lake, ds.field("compressor_version") == name)
    matching = matching or _rows(lake, _newest_of(lake, name))
    if not matching:
        known = sorted({r["compressor_version"] for r in _rows(lake)})
        raise InputError(
            f"no compressor version or line called {name!r}; the lake has: "
            f"{', '.join(known) or 'none'}"
        )
    return max(matching, key=_age)


def newest(lake: str, domain_name: str) -> list[dict[str, Any]]:
    """The newest version's row of each line that compresses the domain, by the line's name."""
    if not delta.exists(lake, tables.compressor_versions()):
        return []
    found: dict[str, dict[str, Any]] = {}
    for row in _rows(lake):
        line = row["compressor_line"]
        if row["domain"] == domain_name and (line not in found or _age(row) > _age(found[line])):
            found[line] = row
    return [found[line] for line in sorted(found)]


def ending(lake: str, line: str, days: Days) -> list[dict[str, Any]]:
    """The rows of a line's versions that end inside `days` or with them."""
    if not delta.exists(lake, tables.compressor_versions()):
        return []
    end = ds.field("end")
    is_within = (end > pa.scalar(days.start)) & (end <= pa.scalar(days.end))
    return _rows(lake, (ds.field("compressor_line") == line) & is_within)


def of_line(lake: str, line: str) -> list[dict[str, Any]]:
    """The newest rows of a line; none where it has none."""
    exists = delta.exists(lake, tables.compressor_versions())
    return _rows(lake, _newest_of(lake, line)) if exists else []


def trained_by(lake: str, version: str) -> str:
    """The run that trained a version last; empty where no commit says so."""
    told = (
        commit for _, commit in delta.commits(delta.open_table(lake, tables.compressor_versions()))
    )
    return next(
        (c["run"] for c in told if c.get("compressor_version") == version and "run" in c), ""
    )


def _rows(lake: str, kept: ds.Expression | None = None) -> list[dict[str, Any]]:
    """Files that can have none of them, by what the log says of each, are not opened."""
    table = tables.compressor_versions()
    scanned = delta.scan(delta.open_table(lake, table), table, table.schema.names, kept)
    rows: list[dict[str, Any]] = scanned.to_table().to_pylist()
    return rows


def _newest_of(lake: str, line: str) -> ds.Expression:
    """Which rows end last of a line's, by what the log says of its files: of one version a day the
    others need not be opened."""
    found = delta.open_table(lake, tables.compressor_versions()).get_add_actions(flatten=True)
    is_line, told = ds.field("compressor_line") == line, pa.table(found)
    if "max.end" not in told.column_names:
        return is_line
    ends = told.filter(pc.field("partition.compressor_line") == line)["max.end"]
    if not len(ends) or ends.null_count:
        return is_line
    return is_line & (ds.field("end") >= pc.max(ends))


def _age(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["end"], row["compressor_version"]
