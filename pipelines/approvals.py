"""Which compressor line of a domain is approved: what daily runs walk, and what it came after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.dataset as ds

from pipelines import delta, lines, tables
from pipelines.domain import Domain
from pipelines.errors import InputError
from pipelines.names import checked_line

APPROVED = "approved"
"""In place of a line's name: the one that is approved when the command starts."""


class Approval(NamedTuple):
    """The approved line of a domain, and those approved before it, newest first."""

    line: str
    earlier: tuple[str, ...]
    evidence: Mapping[str, Any]


def approved(lake: str, domain: Domain) -> Approval | None:
    """None: no line of the domain has been approved."""
    table = tables.approvals()
    if not delta.exists(lake, table):
        return None
    is_its = ds.field("domain") == domain.name
    opened = delta.open_table(lake, table)
    rows = delta.scan(opened, table, table.schema.names, is_its).to_table().to_pylist()
    if not rows:
        return None
    return Approval(rows[0]["line"], tuple(rows[0]["earlier"]), json.loads(rows[0]["evidence"]))


def approve(
    lake: str, domain: Domain, line: str, evidence: Mapping[str, Any], *, commit: Mapping[str, str]
) -> Approval:
    """The line is the approved one; the one before it is kept for a roll-back. Nothing changes
    where it already is."""
    row = lines.find(lake, checked_line(line))
    if row["compressor_line"] != line or row["domain"] != domain.name:
        raise InputError(
            f"{line} is not a line of {domain.name}: it names version {row['compressor_version']} "
            f"of line {row['compressor_line']}, which compresses {row['domain']}"
        )
    held = approved(lake, domain)
    if held is not None and held.line == line:
        return held
    earlier = () if held is None else (held.line, *(e for e in held.earlier if e != line))
    return _write(lake, domain, Approval(line, earlier, evidence), commit)


def roll_back(lake: str, domain: Domain, *, commit: Mapping[str, str]) -> Approval:
    """The line approved before is the approved one again; InputError where there is none."""
    held = approved(lake, domain)
    if held is None or not held.earlier:
        now = "no line is approved" if held is None else f"{held.line} is the first approved one"
        raise InputError(f"there is nothing to roll {domain.name} back to: {now}")
    line, *earlier = held.earlier
    evidence = {"rolled_back": held.line}
    return _write(lake, domain, Approval(line, tuple(earlier), evidence), commit)


def _write(lake: str, domain: Domain, now: Approval, commit: Mapping[str, str]) -> Approval:
    table = tables.approvals()
    row = {
        "domain": domain.name,
        "line": now.line,
        "earlier": list(now.earlier),
        "evidence": json.dumps(dict(now.evidence), sort_keys=True, default=str),
    }
    rows = pa.Table.from_pylist([row], table.schema)
    where = f"domain = '{domain.name}'"
    delta.replace(lake, table, rows, None, where=where, commit={**commit, "line": now.line})
    return now
