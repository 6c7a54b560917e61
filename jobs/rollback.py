"""Approve the line again that was approved before the present one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from jobs import ledger
from pipelines import approvals
from pipelines.domain import load as load_domain


@dataclass(frozen=True, kw_only=True)
class Args:
    """Go back to the line that was approved before. Its tokens and weights are all there; `iat
    walk-compressor` walks it on from the day at which it was left."""

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder of the Delta tables."""


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    with ledger.job(args.lake, "rollback", args) as run:
        commit = ledger.commit_of(run, domain, {})
        found = approvals.roll_back(args.lake, domain, commit=commit)
    earlier = ", ".join(found.earlier) or "none"
    sys.stdout.write(f"{domain.name}: approved {found.line}; before: {earlier}\n")
    return {"domain": domain.name, "line": found.line, "earlier": list(found.earlier)}
