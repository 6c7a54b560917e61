"""Compressor lines and versions as their rows in the lake say, without their weights."""

from __future__ import annotations

from typing import Any

from pipelines import delta, tables
from pipelines.errors import InputError


def find(lake: str, name: str) -> dict[str, Any]:
    """The newest row of the version or, given a line, of the line's newest version."""
    rows = delta.read(lake, tables.compressor_versions()).to_pylist()
    matching = [r for r in rows if name in (r["compressor_version"], r["compressor_line"])]
    if not matching:
        known = sorted({r["compressor_version"] for r in rows})
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
    for row in delta.read(lake, tables.compressor_versions()).to_pylist():
        line = row["compressor_line"]
        if row["domain"] == domain_name and (line not in found or _age(row) > _age(found[line])):
            found[line] = row
    return [found[line] for line in sorted(found)]


def trained_by(lake: str, version: str) -> str:
    """The run that trained a version last; empty where no commit says so."""
    told = (
        commit for _, commit in delta.commits(delta.open_table(lake, tables.compressor_versions()))
    )
    return next(
        (c["run"] for c in told if c.get("compressor_version") == version and "run" in c), ""
    )


def _age(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["end"], row["compressor_version"]
