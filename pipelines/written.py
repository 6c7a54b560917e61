"""What a table's own commits say of each of its days: who wrote it last, from which inputs, and
whether that is still right."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any, NamedTuple

from pipelines import delta
from pipelines.tables import Table

MISSING = "missing"


class Written(NamedTuple):
    """The commit that last replaced a day."""

    version: int
    commit: Mapping[str, str]

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Versions of the tables that were read, by name."""
        found: dict[str, Any] = json.loads(self.commit.get("inputs", "{}"))
        return found

    def mark(self, day: date) -> str:
        """What the raw log held of a day when it was read; nothing of a day without events."""
        marks: dict[str, str] = json.loads(self.commit.get("raw", "{}"))
        return marks.get(str(day), "")


class Expected(NamedTuple):
    """What the commit of a day that is right says."""

    config: str
    code: str
    features: Mapping[str, str]
    """By name; one that was added since may be missing in the commit."""
    marks: Mapping[date, str] | None = None
    """Of days of a table made of the raw log: what that holds now, as far as any run has looked."""


def last_written(lake: str, table: Table) -> dict[date, Written]:
    """The last commit of each day that a commit of ours has replaced, empty days too; read from the
    table's log alone."""
    if not delta.exists(lake, table):
        return {}
    return days_written(delta.commits(delta.open_table(lake, table)))


def days_written(
    commits: Iterable[tuple[int, Mapping[str, str]]],
    *,
    line: str | None = None,
    until: int | None = None,
) -> dict[date, Written]:
    """Of a table's commits, newest first: the last of each day.

    Args:
        line: leave out those of other compressor lines.
        until: leave out those after this version.
    """
    found: dict[date, Written] = {}
    for version, commit in commits:
        is_later = until is not None and version > until
        if is_later or (line is not None and commit.get("line") != line):
            continue
        for day in delta.days_told(commit):
            found.setdefault(day, Written(version, commit))
    return found


def why_again(
    day: date,
    table: Mapping[date, Written],
    expected: Expected,
    upstream: Mapping[str, Mapping[date, Written]],
) -> str | None:
    """Why a day of a table has to be written (again); None if it is right.

    Args:
        table: the last commits of its days.
        upstream: those of the tables that it is made of, by name.
    """
    last = table.get(day)
    if last is None:
        return MISSING
    if last.commit.get("config") != expected.config:
        return "domain file changed"
    for name, made in json.loads(last.commit.get("features", "{}")).items():
        if expected.features.get(name) != made:
            return f"feature {name} changed"
    if last.commit.get("code") != expected.code:
        return f"code changed from {last.commit.get('code')} to {expected.code}"
    if expected.marks is not None and last.mark(day) != expected.marks.get(day, ""):
        return "raw log changed"
    for name, days in upstream.items():
        newer = days.get(day)
        if newer is not None and newer.version > int(last.inputs.get(name, -1)):
            return f"{name} rewritten"
    return None
