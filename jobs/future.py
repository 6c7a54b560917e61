"""Which events come from the future: the one thing that the clock decides about a log."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

from pipelines.domain import Domain


def without_future(domain: Domain, end: date | None) -> Domain:
    """With no end asked for, a mistyped year must not make the log a century long.

    The clock decides only which events are refused as coming from the future; where the end of the
    days is given, nothing.
    """
    if domain.limits.latest or end is not None:
        return domain
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    return replace(domain, limits=replace(domain.limits, latest=tomorrow.isoformat()))


def latest_of(domain: Domain) -> date:
    """From this day on there are no events but those from the future."""
    return date.fromisoformat(domain.limits.latest) if domain.limits.latest else date.max
