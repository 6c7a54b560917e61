"""Read a table of the lake, replace some days of it, without a JVM."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from itertools import chain
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import (
    ColumnProperties,
    CommitProperties,
    DeltaTable,
    Schema,
    WriterProperties,
    write_deltalake,
)
from deltalake.exceptions import (
    CommitFailedError,
    DeltaError,
    SchemaMismatchError,
    TableNotFoundError,
)
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from pipelines.days import Days
from pipelines.errors import InputError, RetryableError
from pipelines.names import checked_line, checked_table
from pipelines.schema_changes import added, check_all, check_meanings
from pipelines.tables import FEATURE, Table

Written = TypeVar("Written")

AskedDays = Days | Collection[date] | None
"""A range, or some days; None: all of a table's."""

MAX_TRIES = 8
ROW_GROUP = 32_768
"""Rows: cut this small, those of one user are found an order of magnitude faster."""
NUM_INDEXED = "delta.dataSkippingNumIndexedCols"
KEPT_LOG = {"delta.logRetentionDuration": "interval 36500 days"}
"""Commits are what tells right days from stale ones, and manifests pin old versions; by default
they are gone after 30 days."""
KEEPS_ROWS = frozenset({"SET TBLPROPERTIES", "VACUUM START", "VACUUM END"})
"""Operations of commits after which a table holds the rows of before."""
CHECKPOINTS = {"delta.checkpointInterval": "10"}
"""Commits, as Spark has it; delta-rs by itself reads up to a hundred to open a table."""
OF_EVENTS = KEPT_LOG | {NUM_INDEXED: "0"}
"""Properties of every table of events: a file's smallest and largest user id in the log would
outlive the user, and as hashes they help no reader to skip a file."""
STATS_OF = "delta.dataSkippingStatsColumns"


def uri(lake: str, table: Table) -> str:
    """Where the table is: a path or an object-store URI below the lake."""
    return f"{lake.rstrip('/')}/{checked_table(table.name)}"


def exists(lake: str, table: Table) -> bool:
    return DeltaTable.is_deltatable(uri(lake, table))


def open_table(lake: str, table: Table, version: int | None = None) -> DeltaTable:
    """The table at a version (None: the newest)."""
    try:
        return DeltaTable(uri(lake, table), version=version)
    except TableNotFoundError as error:
        raise InputError(
            f"the lake {lake} has no table {table.name}; run the job that writes it first"
        ) from error


def days_of(
    lake: str, table: Table, start: date | None = None, end: date | None = None
) -> tuple[Days, int]:
    """The days asked for, within a table's own (None: its first, its last), and its version.

    From the partitions alone. A day without rows between the first and the last is a day like any
    other, and so is one that a commit has emptied; InputError where the range lies outside them.
    """
    opened = open_table(lake, table)
    found = sorted(date.fromisoformat(str(p["event_date"])) for p in opened.partitions())
    is_outside = not found or (end or date.max) <= found[0] or (start or date.min) > found[-1]
    if is_outside and start is not None and end is not None and start < end:
        # Only here is the whole log of commits read: a day among others must not cost all of them.
        emptied = {day for _, commit in commits(opened) for day in days_told(commit)}
        found = sorted({*found, *(day for day in Days(start, end) if day in emptied)})
    if not found:
        raise InputError(f"{table.name} is empty; run the job that writes it first")
    first, last = start or found[0], end or found[-1] + timedelta(days=1)
    if first >= last or last <= found[0] or first > found[-1]:
        raise InputError(
            f"{table.name} has no rows in [{first}, {last}): its days go from {found[0]} to "
            f"{found[-1]} (--end is the day after the last); build those days first"
        )
    return Days(first, last), opened.version()


def commits(
    opened: DeltaTable, limit: int | None = None
) -> Iterator[tuple[int, Mapping[str, str]]]:
    """(version, what it says of itself), newest first, of the `limit` newest; commits that are not
    ours are left out."""
    for action in opened.history(limit):
        said = action.get("userMetadata") or action.get("iat")
        if said:
            yield int(action["version"]), json.loads(said)


def days_changed(opened: DeltaTable, since: int, *, line: str | None = None) -> set[date] | None:
    """The days that commits after version `since` replaced; None where that cannot be told: a
    commit that is not ours, or that names no days, as an erasure's; a log that lost its commits.

    Args:
        line: leave out commits of other compressor lines.
    """
    num = opened.version() - since
    if num < 0:
        return None
    actions = opened.history(num) if num else []
    if sorted(int(action["version"]) for action in actions) != [*range(since + 1, since + 1 + num)]:
        return None
    found: set[date] = set()
    for action in actions:
        if action["operation"] in KEEPS_ROWS:
            continue
        commit = json.loads(action.get("userMetadata") or action.get("iat") or "{}")
        if "start" not in commit:
            return None
        if line is None or commit.get("line", line) == line:
            found |= set(days_told(commit))
    return found


def days_told(commit: Mapping[str, str]) -> Days:
    """The days that a commit replaced; none where it does not say."""
    if "start" not in commit:
        return Days(date.min, date.min)
    return Days(*(date.fromisoformat(commit[key]) for key in ("start", "end")))


def with_days(commit: Mapping[str, str], days: Days | None) -> dict[str, str]:
    """A commit's metadata with the days that it replaces, by which each day's last commit is
    found."""
    if days is None:
        return dict(commit)
    return {**commit, "start": str(days.start), "end": str(days.end)}


def num_rows(lake: str, table: Table, days: Days, *, version: int | None = None) -> dict[date, int]:
    """Rows of each of the days that has any, from the table's log: no file is read."""
    actions = pa.table(open_table(lake, table, version).get_add_actions(flatten=True)).to_pylist()
    found: dict[date, int] = {}
    for action in actions:
        day = action["partition.event_date"]
        if day in days:
            found[day] = found.get(day, 0) + action["num_records"]
    return found


def read(
    lake: str,
    table: Table,
    days: Days | None = None,
    *,
    columns: Sequence[str] | None = None,
    line: str | None = None,
    version: int | None = None,
) -> pa.Table:
    """The rows of `days` (None: all), in the table's order; `line` keeps one compressor line.

    A feature that came later reads as missing in the days before it.
    """
    kept = ds.field("compressor_line") == line if line is not None else None
    opened = open_table(lake, table, version)
    wanted = list(columns) if columns is not None else list(table.schema.names)
    order = [c for c in ("event_date", *table.sort_by) if c in table.schema.names]
    hidden = [c for c in order if c not in wanted]
    rows = scan(opened, table, [*wanted, *hidden], kept, days=days).to_table()
    rows = rows.sort_by([(c, "ascending") for c in order]) if order else rows
    schema = pa.schema([table.schema.field(c) for c in wanted])
    return rows.select(wanted).cast(schema)


def scan(
    opened: DeltaTable,
    table: Table,
    columns: Sequence[str],
    kept: ds.Expression | None = None,
    *,
    days: AskedDays = None,
    rows_at_once: int | None = None,
) -> ds.Scanner:
    """Declared columns of the rows of `days` that `kept` keeps, in no order; a feature that came
    later reads as missing (`Table.missing`) in the days before it.

    `rows_at_once`: a batch's, few of which are held, each file's in its order; None: what is fast.

    InputError where a stored feature means something else than declared.
    """
    values = projection(opened, table, columns)
    held = {"batch_size": rows_at_once, "batch_readahead": 1, "fragment_readahead": 1}
    return dataset(opened, table, days).scanner(
        columns=values, filter=kept, **(held if rows_at_once else {})
    )


def projection(
    opened: DeltaTable, table: Table, columns: Sequence[str]
) -> dict[str, ds.Expression]:
    """What `scan` reads of declared columns, and its error."""
    check_meanings(table, stored_meanings(opened))
    values: dict[str, ds.Expression] = {}
    for column in columns:
        value, missing = ds.field(column), table.missing(column)
        if missing is not None:
            value = pc.coalesce(value, pa.scalar(missing, table.schema.field(column).type))
        values[column] = value
    return values


def dataset(opened: DeltaTable, table: Table, days: AskedDays = None) -> ds.FileSystemDataset:
    """The table's files; where a feature's column came later, or is not there yet, it is null."""
    found = files(opened, days)
    new = [table.schema.field(column) for column in added(table, stored_meanings(opened))]
    return found.replace_schema(pa.schema([*found.schema, *new])) if new else found


def files(opened: DeltaTable, days: AskedDays = None) -> ds.FileSystemDataset:
    """The files of `days` as they are stored, on a local disk read without Python.

    Days cost nothing that are not asked for, where a filter of rows would look at each.
    ValueError where the table is not partitioned by day.

    The file system of delta-rs, which an object store keeps, asks Python for every read
    (`duck.register`).
    """
    if days is not None and "event_date" not in opened.metadata().partition_columns:
        raise ValueError(f"{opened.table_uri} has no days: it is not partitioned by event_date")
    place, system = urlsplit(opened.table_uri), None
    if place.scheme == "file":
        mapped = LocalFileSystem(use_mmap=True)
        system = SubTreeFileSystem(url2pathname(place.path), mapped)
    return opened.to_pyarrow_dataset(filesystem=system, file_pruning_predicate=_of(days))


def _of(days: AskedDays) -> str | None:
    """Days as a predicate on `event_date`."""
    if days is None:
        return None
    if isinstance(days, Days):
        return days.predicate()
    names = ", ".join(f"'{day}'" for day in sorted(days))
    return f"event_date IN ({names})"


def stored_meanings(opened: DeltaTable) -> dict[str, str | None]:
    """The table's columns, with what its features were declared to hold; None: not said."""
    return {field.name: field.metadata.get(FEATURE) for field in opened.schema().fields}


def check_features(lake: str, *asked: Table) -> None:
    """InputError where days of these tables could not be written beside those that are there."""
    for table in asked:
        if exists(lake, table):
            check_all(table, stored_meanings(open_table(lake, table)))


def evolve(lake: str, table: Table, *, commit: Mapping[str, str]) -> DeltaTable:
    """Every declared feature has its column in the table, which exists; no file is written. Returns
    the table as it is then.

    Errors: InputError where a feature is stored with another meaning, or no longer declared;
    CommitFailedError where another writer was first (try again).
    """
    opened = open_table(lake, table)
    stored = stored_meanings(opened)
    check_all(table, stored)
    new = [table.schema.field(column) for column in added(table, stored)]
    if new:
        fields = Schema.from_arrow(pa.schema(new)).fields
        opened.alter.add_columns(fields, commit_properties=_said(commit))
    return opened


def replace(
    lake: str,
    table: Table,
    rows: pa.Table,
    days: Days | None,
    *,
    commit: Mapping[str, str],
    line: str | None = None,
    where: str | None = None,
) -> int:
    """Make `rows` the whole content of `days` (of one line, or of a predicate `where`). Returns
    the version.

    Running it twice changes nothing. A declared feature that the table lacks comes into it first.
    """
    place = uri(lake, table)
    if not DeltaTable.is_deltatable(place):
        _create(place, table)
    clauses = [days.predicate()] if days is not None else []
    if line is not None:
        clauses.append(f"compressor_line = '{checked_line(line)}'")
    if where is not None:
        clauses.append(where)
    ordered = rows.select(table.schema.names).cast(table.schema)
    if table.sort_by:
        ordered = ordered.sort_by([(c, "ascending") for c in (*table.partition_by, *table.sort_by)])
        # One chunk: the writer takes chunks in any order.
        ordered = ordered.combine_chunks()
    properties = _said(with_days(commit, days))

    def write() -> int:
        opened = evolve(lake, table, commit=commit)
        try:
            write_deltalake(
                opened,
                ordered,
                mode="overwrite",
                predicate=" AND ".join(clauses) or None,
                commit_properties=properties,
                writer_properties=_writer(table),
            )
        except SchemaMismatchError as error:
            # Perhaps a feature of another domain file, which came since the columns were compared.
            check_features(lake, table)
            raise InputError(f"{table.name} is stored with other columns: {error}") from error
        return opened.version()

    return _committed(write, f"{table.name} {days}", place)


def _writer(table: Table) -> WriterProperties:
    """How a table's files are written. Vectors hardly get smaller (8% by zstd), and by LZ4 are read
    three times as fast."""
    vectors = [f.name for f in table.schema if pa.types.is_binary(f.type)]
    return WriterProperties(
        max_row_group_size=ROW_GROUP,
        compression="LZ4_RAW" if vectors else "ZSTD",
        column_properties=dict.fromkeys(vectors, ColumnProperties(dictionary_enabled=False)),
    )


def rewrite(
    lake: str,
    table: Table,
    days: Sequence[date],
    changed: Callable[[], Callable[[pa.Table], pa.Table]],
    *,
    commit: Mapping[str, str],
    rows_at_once: int | None = None,
) -> None:
    """Each of `days` becomes what a function makes of its rows, in one commit that names no days:
    they stay those of the commit that wrote them.

    Days are read one at a time, in order. What another writer commits to them meanwhile is a
    conflict, after which `changed` gives a new function and all are read again.

    Args:
        rows_at_once: of a day that need not fit into memory; its function is given so many rows at
            a time, and its files may be in another order afterwards.
    """

    def write() -> None:
        opened, change = evolve(lake, table, commit=commit), changed()

        def made(day: date) -> Iterator[pa.RecordBatch]:
            # A day is one batch: batches that follow each other are written in any order.
            for rows in _pieces(opened, table, day, rows_at_once):
                yield from change(rows).combine_chunks().to_batches()

        # delta-rs asks for batches from within its own runtime, in which it cannot be called.
        with ThreadPoolExecutor(1) as reader:
            of_all = chain.from_iterable(map(made, sorted(days)))
            batches = iter(lambda: reader.submit(next, of_all, None).result(), None)
            write_deltalake(
                opened,
                pa.RecordBatchReader.from_batches(table.schema, batches),
                mode="overwrite",
                predicate=_of(days),
                commit_properties=_said(commit),
                writer_properties=_writer(table),
            )

    if days:
        _committed(write, f"{len(days)} days of {table.name}", uri(lake, table))


def has_properties(lake: str, table: Table, wanted: Mapping[str, str]) -> bool:
    return wanted.items() <= open_table(lake, table).metadata().configuration.items()


def ensure_properties(lake: str, table: Table, wanted: Mapping[str, str]) -> None:
    """Give an older table the properties that it would be made with now."""
    if not has_properties(lake, table, wanted):
        _committed(
            lambda: open_table(lake, table).alter.set_table_properties(dict(wanted)),
            f"the properties of {table.name}",
            uri(lake, table),
        )


def _pieces(
    opened: DeltaTable, table: Table, day: date, rows_at_once: int | None
) -> Iterator[pa.Table]:
    """A day's rows in the table's order, or so many of them at a time as they lie in its files."""
    scanned = scan(opened, table, table.schema.names, days=[day], rows_at_once=rows_at_once)
    if rows_at_once:
        for batch in scanned.to_batches():
            yield pa.Table.from_batches([batch]).cast(table.schema)
        return
    order = dict.fromkeys((*table.partition_by, *table.sort_by))
    yield scanned.to_table().cast(table.schema).sort_by([(name, "ascending") for name in order])


def _committed(write: Callable[[], Written], what: str, place: str) -> Written:
    """Write; while other writers win, up to MAX_TRIES times."""
    for attempt in range(MAX_TRIES):
        try:
            return write()
        except CommitFailedError as error:
            if attempt + 1 == MAX_TRIES:
                raise RetryableError(f"another writer kept winning {what}: {error}") from error
            time.sleep(random.uniform(0, 0.1 * 2**attempt))
        except OSError as error:
            raise RetryableError(f"could not write {what}: {error}") from error
        except DeltaError as error:
            raise _as_ours(error, f"could not write {place}") from error
    raise AssertionError("unreachable")


def _said(commit: Mapping[str, str]) -> CommitProperties:
    return CommitProperties(custom_metadata={"iat": json.dumps(dict(commit), sort_keys=True)})


def _create(where: str, table: Table) -> None:
    """The empty table first, so that the predicate guards the first write too; losing the race to
    create it is fine."""
    try:
        DeltaTable.create(
            where,
            table.schema,
            mode="error",
            partition_by=list(table.partition_by),
            configuration=CHECKPOINTS | _properties(table),
        )
    except (DeltaError, OSError) as error:
        if not DeltaTable.is_deltatable(where):
            raise _as_ours(error, f"could not create {where}") from error


def _properties(table: Table) -> dict[str, str]:
    """Of tables of events as of all of them; of others a file's key and days are in the log, and
    not the texts beside them."""
    if "event_date" in table.partition_by:
        return OF_EVENTS
    told = [
        field.name
        for field in table.schema
        if field.name in table.key or pa.types.is_date(field.type)
    ]
    return KEPT_LOG | {STATS_OF: ",".join(c for c in told if c not in table.partition_by)}


def _as_ours(error: Exception, what: str) -> Exception:
    """A full disk or a place that may not be written, which have no class of their own, as ours."""
    text = str(error)
    if "No space left on device" in text:
        return RetryableError(f"{what}: no space left on the disk; free some space")
    if any(sign in text for sign in ("Permission denied", "Read-only", "Not a directory")):
        return InputError(f"{what}: {text}; choose another --lake, or change who may write to it")
    return error
