"""Which days of a line's materialised samples are right or stale, from the tables' logs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date

from jobs import ledger
from jobs.token_states import Reasons
from pipelines import delta, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.written import Expected, Written, days_written, last_written, why_again


def materialized_states(lake: str, domain: Domain, days: Days) -> dict[str, Reasons]:
    """By line, for those that have any: its days from its first to its last within `days`. A day is
    stale, too, when histories or tokens of a day before it were written after it had read them."""
    table = tables.materialized(domain)
    if not delta.exists(lake, table):
        return {}
    commits = list(delta.commits(delta.open_table(lake, table)))
    tokens = tables.instance_tokens(domain.name)
    of_tokens = list(delta.commits(delta.open_table(lake, tokens)))
    samples, histories = tables.ranker_samples(domain), tables.histories(domain)
    expected = Expected(ledger.config_of(domain), ledger.code_version(), ledger.features_of(domain))
    by_samples, by_histories = last_written(lake, samples), last_written(lake, histories)
    found: dict[str, Reasons] = {}
    for line in sorted({str(commit["line"]) for _, commit in commits if "line" in commit}):
        written = days_written(commits, line=line)
        upstream = {
            samples.name: by_samples,
            histories.name: _until(by_histories, days),
            tokens.name: _until(days_written(of_tokens, line=line), days),
        }
        found[line] = {
            day: why_again(day, written, expected, upstream)
            for day in days
            if min(written) <= day <= max(written)
        }
    return found


def _until(written: Mapping[date, Written], days: Days) -> dict[date, Written]:
    """By day, the newest commit of it and of all days before it."""
    found: dict[date, Written] = {}
    newest: Written | None = None
    for day in sorted({*written, *days}):
        last = written.get(day)
        if last is not None and (newest is None or last.version > newest.version):
            newest = last
        if newest is not None:
            found[day] = newest
    return found
