"""Which days of a compressor line's tokens are right, missing or stale, from the tables' logs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

from jobs import ledger
from pipelines import delta, lines, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.tables import Table
from pipelines.written import Expected, Written, days_written, last_written, why_again

Reasons = Mapping[date, str | None]
"""Why each day has to be written again, None where it is right."""
Commits = Sequence[tuple[int, Mapping[str, str]]]
BEFORE = "earlier days rewritten"


class TokenStates(NamedTuple):
    """Of one compressor line."""

    tokens: Reasons
    items: Reasons
    """Item tokens of a day sum up its tokens and those of all days before it."""
    without: Collection[date]
    """Days that the line's stream was never written for."""
    later: Sequence[date]
    """Days after the ones asked for that have item tokens."""


def token_states(
    lake: str, domain: Domain, rows: Iterable[Mapping[str, Any]], days: Days
) -> dict[str, TokenStates]:
    """By line; a streaming line has no days before its first.

    Args:
        rows: each line's version (of `compressor_versions`).
    """
    written, sums = (
        _commits(lake, make(domain.name)) for make in (tables.instance_tokens, tables.item_tokens)
    )
    return {row["compressor_line"]: _of(lake, domain, row, days, written, sums) for row in rows}


def _of(
    lake: str,
    domain: Domain,
    row: Mapping[str, Any],
    days: Days,
    token_commits: Commits,
    item_commits: Commits,
) -> TokenStates:
    line, is_streaming = row["compressor_line"], row["protocol"] == "streaming"
    written, sums = (days_written(told, line=line) for told in (token_commits, item_commits))
    expected = Expected(ledger.config_of(domain), ledger.code_version(), ledger.features_of(domain))
    wanted = {"delay_us": str(domain.tokens.delay_us)}
    if not is_streaming:  # a streaming line has a version a day
        name = row["compressor_version"]
        wanted |= {"compressor_version": name, "trained_by": lines.trained_by(lake, name)}
    stream, tokens = tables.stream(domain, row["order"]), tables.instance_tokens(domain.name)
    streams = last_written(lake, stream)
    # What one run wrote of both goes together, whatever it says it read.
    apart = {day: on for day, on in written.items() if not _is_of_run(sums.get(day), on)}
    of_line = [day for day in days if not is_streaming or day >= row["start"]]
    before = _newest_before(sums)
    found: dict[date, str | None] = {}
    summed: dict[date, str | None] = {}
    for day in of_line:
        found[day] = why_again(day, written, expected, {stream.name: streams}) or _why_other(
            written[day].commit, wanted
        )
        summed[day] = why_again(day, sums, expected, {tokens.name: apart}) or _why_other(
            sums[day].commit, wanted
        )
        if summed[day] is None and before[day] > sums[day].version:
            summed[day] = BEFORE
    without = {day for day in of_line if day not in streams}
    return TokenStates(found, summed, without, sorted(day for day in sums if day >= days.end))


def _commits(lake: str, table: Table) -> Commits:
    return list(delta.commits(delta.open_table(lake, table))) if delta.exists(lake, table) else []


def _is_of_run(sums: Written | None, tokens: Written) -> bool:
    return sums is not None and sums.commit.get("run") == tokens.commit.get("run")


def _newest_before(sums: Mapping[date, Written]) -> dict[date, int]:
    """The newest version that any earlier day was written at; by day, -1 for the first."""
    found, newest = {}, -1
    for day in sorted(sums):
        found[day] = newest
        newest = max(newest, sums[day].version)
    return found


def _why_other(commit: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """What a commit says otherwise than wanted; one of before a word was said of it is right."""
    told = {word: commit.get(word) or value for word, value in wanted.items()}
    if told["delay_us"] != wanted["delay_us"]:
        return "publishing delay changed"
    if told.get("compressor_version") != wanted.get("compressor_version"):
        return f"written by {told['compressor_version']}"
    if told.get("trained_by") != wanted.get("trained_by"):
        return "version trained again"
    return None
