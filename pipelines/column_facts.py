"""What is in the columns of an event log: counts, ranges, quantiles, and what each depends on.

Counts and ranges are of the whole log, the rest of a random sample of its rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from pipelines import delta, duck
from pipelines.domain import Format
from pipelines.errors import InputError

SAMPLE_ROWS = 100_000
ENOUGH_PAIRS = 20
QUANTILES = (0.05, 0.5, 0.95, 0.99)
NUMBERS = frozenset({
    "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL",
    "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "UHUGEINT",
})  # fmt: skip
TIMES = ("TIMESTAMP", "DATE")
SEPARATORS = ("|", ";", ",")
HELP = "give a Parquet or CSV file, a folder of them, or a Delta table"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """One column."""

    name: str
    type: str
    """DuckDB's name of it."""
    missing_share: float = 0.0
    distinct: int = 0
    """Different values: exact in a log no larger than the sample, else within a few per cent."""
    minimum: Any = None
    maximum: Any = None
    quantiles: tuple[float, ...] = ()
    """Of a number, at QUANTILES."""
    is_whole: bool = False
    """A number without fractions."""
    mean_length: float = 0.0
    """Characters of a text."""
    is_iso_time: bool = False
    separator: str = ""
    """Between the values of a text that holds several."""
    num_parts: int = 0
    """Different values inside a list or a separated text; 0: single values."""
    most_parts: int = 0
    """How many of them a row holds, at the 99th percentile."""

    @property
    def is_time(self) -> bool:
        return self.type.startswith(TIMES)

    @property
    def is_number(self) -> bool:
        return bool(self.quantiles)

    @property
    def is_text(self) -> bool:
        return self.type == "VARCHAR"

    @property
    def is_skewed(self) -> bool:
        """A number from 0 up with a long tail of large values."""
        low, middle, high, top = self.quantiles
        return self.minimum >= 0 and max(high, top / 2) - middle > 3 * (middle - low)

    @property
    def is_code(self) -> bool:
        """A number that numbers things: a few, or nearly all of a range and no count."""
        if not self.is_whole:
            return False
        is_dense = self.distinct >= 0.9 * (self.maximum - self.minimum + 1)
        if self.distinct <= 64:  # codes with gaps in between become floats in many tools
            return is_dense or self.type not in ("FLOAT", "DOUBLE", "DECIMAL")
        return self.distinct <= 4096 and is_dense and not self.is_skewed

    @property
    def is_readable(self) -> bool:
        """A single value or a list of them, not a structure or bytes."""
        known = self.is_number or self.is_text or self.is_time or self.num_parts > 0
        return known or self.type == "BOOLEAN"

    @property
    def is_binary(self) -> bool:
        """Only false and true, or 0 and 1."""
        zero_or_one = self.is_whole and (self.minimum, self.maximum) == (0, 1)
        return self.distinct <= 2 and (self.type == "BOOLEAN" or zero_or_one)


@dataclass(frozen=True, slots=True)
class Log:
    """An event log opened for reading."""

    path: str
    format: Format
    num_rows: int
    connection: duckdb.DuckDBPyConnection = field(repr=False)

    def facts(self) -> dict[str, Facts]:
        """Every column's, in the log's order."""
        described = self.connection.execute("DESCRIBE sampled").fetchall()
        columns = {name: kind for name, kind, *_ in described if name != "shuffled"}
        return {name: self._facts(name, kind) for name, kind in columns.items()}

    def agreement(self, column: str, by: str) -> tuple[float, float]:
        """How often two rows of the same `by` have the same value, and any two rows.

        With fewer than ENOUGH_PAIRS pairs of the same `by` the first is not known: 0.
        """
        value, group = quoted(column), quoted(by)
        pairs, alike, anyhow = self._row(
            "SELECT count(*) FILTER (is_pair), avg(alike::INT) FILTER (is_pair), avg(anyhow::INT) "
            f"FROM (SELECT {group} = lag({group}) OVER grouped AS is_pair, "
            f"{value} = lag({value}) OVER grouped AS alike, "
            f"{value} = lag({value}) OVER mixed AS anyhow "
            f"FROM sampled WHERE {value} IS NOT NULL AND {group} IS NOT NULL "
            f"WINDOW grouped AS (ORDER BY {group}, shuffled), mixed AS (ORDER BY shuffled))"
        )
        return (alike if pairs >= ENOUGH_PAIRS else 0.0), anyhow or 0.0

    def highest_with_share(self, column: str, share: float) -> float:
        """The lowest number that no more than `share` of the rows reach."""
        (found,) = self._row(
            f"SELECT min(v) FROM (SELECT {quoted(column)} AS v, count(*) AS n FROM sampled "
            "WHERE v IS NOT NULL GROUP BY v QUALIFY "
            f"sum(n) OVER (ORDER BY v DESC) <= {share} * sum(n) OVER ())"
        )
        return math.inf if found is None else float(found)

    def _facts(self, name: str, kind: str) -> Facts:
        c = quoted(name)
        is_list, is_number = kind.endswith("[]"), kind.split("(")[0] in NUMBERS
        where = "sampled" if self.num_rows <= SAMPLE_ROWS else "log"
        count = "count(DISTINCT {})" if where == "sampled" else "approx_count_distinct({})"
        filled, distinct = self._row(f"SELECT count({c}), {count.format(c)} FROM {where}")
        found: dict[str, Any] = {
            "missing_share": 1 - filled / max(self.num_rows, 1),
            "distinct": distinct,
        }
        if is_number or kind.startswith(TIMES):
            # Of a not finite number nothing can be said but that it is not there.
            finite = f"FILTER (isfinite({c}))" if kind in ("FLOAT", "DOUBLE") else ""
            low, high = self._row(f"SELECT min({c}) {finite}, max({c}) {finite} FROM log")
            found |= {"minimum": low, "maximum": high}
        if is_number and found["minimum"] is not None:
            kept = f"FROM sampled WHERE isfinite({c}::DOUBLE)"
            quantiles, whole = self._row(
                f"SELECT quantile_cont({c}::DOUBLE, {list(QUANTILES)}), "
                f"bool_and({c}::DOUBLE = round({c}::DOUBLE)) {kept}"
            )
            found |= {"quantiles": tuple(quantiles or ()), "is_whole": bool(whole)}
        if kind == "VARCHAR" and filled:
            found |= self._text(c)
        if is_list and "STRUCT" not in kind:
            found |= self._parts(c)
        return Facts(name=name, type=kind, **found)

    def _text(self, c: str) -> dict[str, Any]:
        dated = rf"regexp_matches({c}, '^\s*\d{{4}}-\d{{1,2}}-\d{{1,2}}')"
        length, is_iso, *shares = self._row(
            f"SELECT avg(length({c})), "
            f"avg(({dated} AND TRY_CAST({c} AS TIMESTAMP) IS NOT NULL)::INT), "
            + ", ".join(f"avg(contains({c}, '{s}')::INT)" for s in SEPARATORS)
            + f" FROM sampled WHERE {c} IS NOT NULL"
        )
        found: dict[str, Any] = {"mean_length": length, "is_iso_time": is_iso > 0.99}
        for separator, share in zip(SEPARATORS, shares, strict=True):
            # Titles hold commas too: the parts of a real list recur from row to row.
            if share < 0.1:
                continue
            parts = self._parts(
                f"list_transform(string_split({c}, '{separator}'), lambda x: trim(x))"
            )
            (whole,) = self._row(f"SELECT count(DISTINCT {c}) FROM sampled")
            if parts["num_parts"] < 0.5 * whole:
                return found | parts | {"separator": separator}
        return found

    def _parts(self, values: str) -> dict[str, Any]:
        parts, most = self._row(
            f"SELECT (SELECT count(DISTINCT p) FROM (SELECT unnest({values}) AS p FROM sampled)), "
            f"quantile_disc(len({values}), 0.99) FROM sampled"
        )
        return {"num_parts": parts, "most_parts": most or 0}

    def _row(self, query: str) -> tuple[Any, ...]:
        found = self.connection.execute(query).fetchone()
        assert found is not None
        return found


def open_log(data: str) -> Log:
    """The event log at a path or, for Delta, a URI.

    Raises:
        InputError: nothing is there, it cannot be read, or it has no rows.
    """
    connection = duckdb.connect()
    try:
        kind = view(connection, data)
        connection.execute(
            "CREATE TEMP TABLE sampled AS "
            "SELECT *, row_number() OVER (ORDER BY hash(s)) AS shuffled "
            f"FROM (FROM log USING SAMPLE reservoir({SAMPLE_ROWS} ROWS) REPEATABLE (17)) s"
        )
        (num_rows,) = connection.execute("SELECT count(*) FROM log").fetchall()[0]
    except (duckdb.Error, DeltaError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{data} cannot be read: {reason}; {HELP}") from error
    if not num_rows:
        raise InputError(f"{data} has no rows, and a draft is made from what rows hold")
    return Log(path=data, format=kind, num_rows=num_rows, connection=connection)


def view(connection: duckdb.DuckDBPyConnection, data: str) -> Format:
    """Make the view `log` of an event log; returns what it was made from."""
    path = Path(data)
    if "://" not in data and not path.exists():
        raise InputError(f"there is nothing at {data}; {HELP}")
    if not path.is_file() and DeltaTable.is_deltatable(data):
        duck.register(connection, "log", delta.files(DeltaTable(data)))
        return "delta"
    if "://" in data:
        raise InputError(f"{data} is no Delta table, the one kind that is read by URI; {HELP}")
    for kind in ("parquet", "csv"):
        here = [path] if path.suffix == f".{kind}" else []
        files = sorted(path.rglob(f"*.{kind}")) if path.is_dir() else here
        if files:
            if kind == "csv":
                _refuse_other_csv(connection, files[0])
            literals = ", ".join("'{}'".format(str(f).replace("'", "''")) for f in files)
            connection.execute(
                f"CREATE VIEW log AS FROM read_{kind}([{literals}], union_by_name = true)"
            )
            return "csv" if kind == "csv" else "parquet"
    raise InputError(
        f"{data} is neither Parquet (*.parquet), CSV (*.csv) nor a Delta table; {HELP}"
    )


def _refuse_other_csv(connection: duckdb.DuckDBPyConnection, file: Path) -> None:
    """Only what the Spark jobs read alike: commas, and names in the first line."""
    query = "SELECT Delimiter, HasHeader, len(Columns) FROM sniff_csv(?)"
    delimiter, has_header, num_columns = connection.execute(query, [str(file)]).fetchall()[0]
    if num_columns > 1 and delimiter != ",":
        raise InputError(
            f"{file} is separated by {delimiter!r}; write it with commas, or as Parquet"
        )
    if not has_header:
        raise InputError(f"{file} has no first line with the columns' names; add one")


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
