"""Which days of a domain's built tables are right, missing or stale, by what one job writes
together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date, timedelta
from typing import Literal, NamedTuple

import pyarrow as pa

from jobs import ledger
from pipelines import delta, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.errors import InputError
from pipelines.tables import Table
from pipelines.written import Expected, Written, last_written, why_again

Group = Literal["instances", "streams", "samples"]
GROUPS: Mapping[Group, tuple[Callable[[Domain], Table], ...]] = {
    "instances": (tables.instances,),
    "streams": (tables.temporal_order, tables.user_order, tables.histories),
    "samples": (tables.ranker_samples,),
}
"""Tables that one job writes from one version of the instances, in the order of the jobs."""

States = Mapping[Group, Mapping[date, str | None]]
"""Why each day has to be written again, None where it is right; by group."""


class Size(NamedTuple):
    """Of a table's day."""

    rows: float
    bytes: float


def states_of(lake: str, domain: Domain, days: Days, marks: Mapping[date, str] | None) -> States:
    """From the tables' logs and what the raw log holds of each day (None: not known); a group is as
    right as the worst of its tables."""
    code = ledger.code_version()
    built = Expected(ledger.config_of(domain), code, ledger.features_of(domain))
    instances = last_written(lake, tables.instances(domain))
    found: dict[Group, Mapping[date, str | None]] = {}
    for group, made in GROUPS.items():
        is_first = group == "instances"
        upstream = {} if is_first else {tables.instances(domain).name: instances}
        expected = built._replace(marks=marks) if is_first else built
        written = [last_written(lake, make(domain)) for make in made]
        found[group] = {day: _worst(day, written, expected, upstream) for day in days}
    return found


def _worst(
    day: date,
    written: list[dict[date, Written]],
    expected: Expected,
    upstream: Mapping[str, Mapping[date, Written]],
) -> str | None:
    found = (why_again(day, table, expected, upstream) for table in written)
    return next((reason for reason in found if reason), None)


def asked(
    lake: str,
    domain: Domain,
    start: date | None,
    end: date | None,
    marks: Mapping[date, str] | None,
) -> Days:
    """The days asked for; None: from the first of the instances (without any: of the raw log), to
    the last of either."""
    raw = sorted(marks or {})
    built = sorted(last_written(lake, tables.instances(domain))) or raw
    days = built + raw[-1:]
    if not days and (start is None or end is None):
        raise InputError(
            f"the lake {lake} has no instances of {domain.name} whose commits name their days: "
            "give --start and --end, or build it first (iat build)"
        )
    return Days(start or days[0], end or max(days) + timedelta(days=1))


def mean_day(lake: str, table: Table, line: str = "") -> Size | None:
    """Mean rows and bytes of the days of a table (of a compressor line, or if it has none of any)
    that have any; None without one."""
    if not delta.exists(lake, table):
        return None
    actions = pa.table(delta.open_table(lake, table).get_add_actions(flatten=True)).to_pylist()
    actions = [a for a in actions if a.get("partition.compressor_line") == line] or actions
    keys = [f"partition.{column}" for column in table.partition_by]
    num_days = len({tuple(action[key] for key in keys) for action in actions})
    if not num_days:
        return None
    rows, size = (sum(a[key] for a in actions) for key in ("num_records", "size_bytes"))
    return Size(rows / num_days, size / num_days)
