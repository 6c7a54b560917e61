"""Approve a compressor line: by hand, or only if it is not worse than the approved one on days that
both have walked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from compressor import predictions
from compressor.training import metrics
from jobs import ledger
from pipelines import approvals, delta, forgotten, tables
from pipelines.approvals import Approval
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import CheckFailedError, InputError


@dataclass(frozen=True, kw_only=True)
class Args:
    """Make a line the approved one of its domain: what `iat walk-compressor` walks from then on.

    With --start and --end it is compared first with the line approved now, by what both predicted
    of these days before they trained on them: approved if the AUC of the new one is not lower by
    more than --margin, at the lower end of the paired 95% interval over users; else exit 1. Without
    days, it is your word that counts.

    Nothing of the line before is removed: `iat rollback` approves it again. Whoever reads tokens
    names a line, so that a ranker goes on with its own until it is told another.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder of the Delta tables."""
    line: str
    """The line to approve."""
    start: date | None = None
    """First day (UTC) of the comparison."""
    end: date | None = None
    """The day after its last."""
    margin: float = 0.005
    """Loss of AUC that is still not worse."""
    bootstraps: int = 200
    """Resamples of users behind the interval."""
    seed: int = 0
    """Of the resamples."""
    dry_run: bool = False
    """Compare and say what would be approved, and stop."""

    def __post_init__(self) -> None:
        if (self.start is None) != (self.end is None):
            raise InputError("a comparison needs both --start and --end")
        if self.margin < 0 or self.bootstraps < 1:
            raise InputError(
                f"--margin must not be negative and --bootstraps at least 1, got {self.margin} "
                f"and {self.bootstraps}"
            )


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    held = approvals.approved(args.lake, domain)
    now = held.line if held else ""
    evidence: dict[str, Any] = {}
    days = Days(args.start, args.end) if args.start and args.end else None
    if days is not None and now and now != args.line:
        evidence = compared(args, domain, now, days)
    result: dict[str, Any] = {
        "domain": domain.name,
        "line": args.line,
        "days": str(days or ""),
        "approved": now,
        "earlier": list(held.earlier) if held else [],
        "evidence": evidence,
    }
    if evidence and not evidence["is_not_worse"]:
        sys.stdout.write(as_text(result))
        raise CheckFailedError(
            f"{args.line} may be worse than {now} by more than {args.margin} of AUC, so {now} "
            "stays approved; compare more days, or approve it without days if you know better",
            result,
        )
    if not args.dry_run:
        with ledger.job(args.lake, "approve", args) as run:
            commit = ledger.commit_of(run, domain, {})
            found = approvals.approve(args.lake, domain, args.line, evidence, commit=commit)
        result |= shown(found)
    sys.stdout.write(as_text(result))
    return result


def compared(args: Args, domain: Domain, now: str, days: Days) -> dict[str, Any]:
    """The new line against the approved one on rows with a known label that both predicted."""
    samples = tables.ranker_samples(domain)
    label_name = f"label_{domain.labels[0].name}"
    columns = ["instance_id", "user_id", label_name]
    rows = delta.read(args.lake, samples, days, columns=columns)
    rows = forgotten.without(rows, forgotten.ids(args.lake, domain))
    label = rows[label_name].to_numpy().astype(np.float64)
    ours, theirs = (
        predictions.logits(args.lake, line, days, rows["instance_id"]) for line in (args.line, now)
    )
    known = ~(np.isnan(label) | np.isnan(ours) | np.isnan(theirs))
    user, label = rows["user_id"].to_numpy()[known], label[known]
    if len(np.unique(label)) < 2:
        raise InputError(
            f"{args.line} and {now} share {len(label)} labelled rows in {days}, of one class or "
            "none: give days with positive and negative labels that both have walked"
        )
    found = metrics.paired_difference(
        user, label, ours[known], theirs[known], "auc", args.bootstraps, args.seed
    )
    return {
        "against": now,
        "rows": len(label),
        "users": len(np.unique(user)),
        "auc": metrics.auc(label, ours[known]),
        "auc_against": metrics.auc(label, theirs[known]),
        "difference": found._asdict(),
        "margin": args.margin,
        "is_not_worse": bool(found.low > -args.margin),
    }


def shown(found: Approval) -> dict[str, Any]:
    """What is approved now, as the command's JSON has it."""
    return {"approved": found.line, "earlier": list(found.earlier)}


def as_text(result: Mapping[str, Any]) -> str:
    """The comparison and what is approved, for people."""
    out = []
    if of := result["evidence"]:
        d = {k: 1e3 * v for k, v in of["difference"].items()}
        out.append(
            f"{result['line']} AUC {of['auc']:.4f}, {of['against']} {of['auc_against']:.4f}: "
            f"{d['value']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}] e-3 over {of['rows']} rows of "
            f"{of['users']} users in {result['days']}"
        )
    earlier = ", ".join(result["earlier"]) or "none"
    out.append(f"{result['domain']}: approved {result['approved'] or 'none'}; before: {earlier}")
    return "\n".join(out) + "\n"
