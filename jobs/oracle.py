"""What a ranker row may know, worked out a second time: brute-force SQL over the instances.

Written apart from the fetch code and sharing none of it: users, items and fields are compared by
their readable values, never by hash, bucket or index row. Histories, labels, counts and item tokens
come from `instances` and the bytes of `instance_tokens`; rules of time: DESIGN.md section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from deltalake import DeltaTable

from pipelines import delta, duck, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.errors import InputError

Array = npt.NDArray[Any]

ITEM_DECAY_PER_DAY = 0.995
COUNT_WINDOWS = (100, 256, None)
"""Events back over which exact matches are counted; None: the whole past."""


@dataclass(frozen=True)
class Sample:
    """Ranker rows to verify, by position: what fetch is asked with, and their readable keys."""

    rows: pa.Table

    def __len__(self) -> int:
        return len(self.rows)

    def ints(self, name: str) -> Array:
        return np.array(self.rows.column(name).to_numpy(), np.int64)


class Oracle:
    """The lake's tables at one version each, asked in SQL."""

    def __init__(self, lake: str, domain: Domain, line: str) -> None:
        self.domain, self.line = domain, line
        declared = {
            "instances": tables.instances(domain),
            "samples": tables.ranker_samples(domain),
            "histories": tables.histories(domain),
            "tokens": tables.instance_tokens(domain.name),
            "item_tokens": tables.item_tokens(domain.name),
            "compressors": tables.compressor_versions(),
        }
        opened = {name: delta.open_table(lake, table) for name, table in declared.items()}
        self.versions = {declared[name].name: found.version() for name, found in opened.items()}
        self.opened = opened
        self.sql = duckdb.connect()
        self.run("SET enable_progress_bar = false")
        for name, found in opened.items():
            self._register(name, found, declared[name])

    def _register(self, name: str, opened: DeltaTable, table: tables.Table) -> None:
        duck.register(self.sql, name, delta.dataset(opened, table))

    def is_current(self) -> bool:
        """Whether nobody has written the tables since they were opened."""
        before = [table.version() for table in self.opened.values()]
        for table in self.opened.values():
            table.update_incremental()
        return before == [table.version() for table in self.opened.values()]

    def run(self, statement: str, parameters: Mapping[str, Any] | None = None) -> None:
        """Run a statement that has no answer."""
        self.sql.execute(statement, parameters).fetchall()

    def table(self, query: str, parameters: Mapping[str, Any] | None = None) -> pa.Table:
        """The answer to a query as an Arrow table."""
        return self.sql.sql(query, params=parameters).to_arrow_table()

    def choose(self, days: Days | None, num_samples: int, seed: int) -> Sample:
        """Random ranker rows, half of them sampled negatives where there are any; by seed alone."""
        asked = f"WHERE {days.predicate()}" if days else ""
        found = self.table(f"SELECT instance_id, is_sampled FROM samples {asked}")
        ids = found.column("instance_id").to_numpy()
        is_sampled = found.column("is_sampled").to_numpy()
        random = np.random.default_rng(seed)
        real, sampled = np.sort(ids[~is_sampled]), np.sort(ids[is_sampled])
        num_sampled = min(len(sampled), max(num_samples // 2, num_samples - len(real)))
        num_real = min(len(real), num_samples - num_sampled)
        chosen = np.concatenate(
            [random.choice(real, num_real, False), random.choice(sampled, num_sampled, False)]
        )
        if not len(chosen):
            raise InputError(f"ranker_samples of {self.domain.name} has no rows to verify {days}")
        self.sql.register("chosen", pa.table({"k": np.arange(len(chosen)), "instance_id": chosen}))
        features = "".join(f", i.{f.stream_column}" for f in self.domain.side_features)
        hashed = "".join(
            f", coalesce(s.{f.stream_column}, 0) AS bucket_{f.name}"
            for f in self.domain.side_features
        )
        self.run(
            f"""CREATE OR REPLACE TEMP TABLE sample AS
            SELECT k, s.instance_id, s.user_id, s.item_id, epoch_us(s.as_of) AS as_of_us,
                   s.is_sampled, i.user_key, i.item_key, epoch_us(i.event_time) AS event_us,
                   s.event_date AS day, i.event_date AS event_day {features} {hashed}
            FROM chosen JOIN samples s USING (instance_id)
            LEFT JOIN instances i USING (instance_id)"""
        )
        self._gather()
        return Sample(self.table("SELECT * FROM sample ORDER BY k"))

    def _gather(self) -> None:
        """The real events of the sample's users and items, and their tokens."""
        features = "".join(f", {f.stream_column}" for f in self.domain.side_features)
        labels = "".join(
            f", label_{x.name}, epoch_us(label_time_{x.name}) AS known_us_{x.name}"
            for x in self.domain.labels
        )
        self.run(
            f"""CREATE OR REPLACE TEMP TABLE past AS
            SELECT instance_id, user_key, item_key, epoch_us(event_time) AS event_us, event_date
                   {features} {labels}
            FROM instances WHERE NOT is_sampled
            AND (user_key IN (SELECT user_key FROM sample)
                 OR item_key IN (SELECT item_key FROM sample))"""
        )
        self.run(
            """CREATE OR REPLACE TEMP TABLE token AS
            SELECT instance_id, epoch_us(available_time) AS available_us, token FROM tokens
            WHERE compressor_line = $line
            AND instance_id IN (SELECT instance_id FROM past)""",
            {"line": self.line},
        )

    def histories(self, length: int) -> pa.Table:
        """The newest `length` events of each sample's user strictly before it, oldest first.

        Labels read 0 unknown by then, 1 negative, 2 positive; a token not readable by then is null.
        """
        features = "".join(f", p.{f.stream_column}" for f in self.domain.side_features)
        labels = "".join(
            f""", CASE WHEN p.label_{x.name} IS NULL OR p.known_us_{x.name} IS NULL
                  OR p.known_us_{x.name} >= s.as_of_us THEN 0
                  ELSE 1 + p.label_{x.name} END AS label_{x.name}"""
            for x in self.domain.labels
        )
        return self.table(
            f"""SELECT s.k, p.instance_id, s.as_of_us - p.event_us AS gap_us,
                CASE WHEN t.available_us < s.as_of_us THEN t.token END AS token,
                row_number() OVER (PARTITION BY s.k
                                   ORDER BY p.event_us DESC, p.instance_id DESC) AS back
                {features} {labels}
            FROM sample s JOIN past p ON p.user_key = s.user_key AND p.event_us < s.as_of_us
            LEFT JOIN token t ON t.instance_id = p.instance_id
            QUALIFY back <= $length ORDER BY s.k, back DESC""",
            {"length": length},
        )

    def matches(self) -> pa.Table:
        """Per sample: events in the past, and per match field its counts and its newest match.

        Columns `history_length`, `<field>_last_<window>`, `<field>_all` and `<field>_gap_us` (null:
        never); the field `item` is the item itself, the others are the domain's match features.
        Two readable values of one bucket are one value; a missing value matches nothing. `buckets`
        comes first.
        """
        fields, joins = {"item": ("p.item_key", "s.item_key")}, ""
        for number, feature in enumerate(self.domain.match_features):
            name = feature.stream_column
            for side in ("p", "s"):
                joins += f""" LEFT JOIN pairs {side}{number} ON {side}{number}.field = '{name}'
                    AND {side}{number}.value = {side}.{name}"""
            fields[feature.name] = (f"p{number}.bucket", f"s{number}.bucket")
        same = ", ".join(f"{a} = {b} AS same_{name}" for name, (a, b) in fields.items())
        measures = ""
        for name in fields:
            for window in COUNT_WINDOWS:
                near = f"same_{name} AND back <= {window}" if window else f"same_{name}"
                measures += f", count(*) FILTER ({near}) AS {name}_{_window(window)}"
            measures += f", min(gap_us) FILTER (same_{name}) AS {name}_gap_us"
        return self.table(
            f"""WITH before AS (
                SELECT s.k, {same}, s.as_of_us - p.event_us AS gap_us,
                row_number() OVER (PARTITION BY s.k
                                   ORDER BY p.event_us DESC, p.instance_id DESC) AS back
                FROM sample s JOIN past p ON p.user_key = s.user_key AND p.event_us < s.as_of_us
                {joins})
            SELECT s.k, count(b.k) AS history_length {measures}
            FROM sample s LEFT JOIN before b ON b.k = s.k GROUP BY s.k ORDER BY s.k"""
        )

    def buckets(self) -> tuple[dict[str, dict[str, int]], pa.Table]:
        """Per side column: readable value -> bucket; and the values that have more than one.

        The pairs are those of the sample's users' histories and of the sample itself. A value
        without a bucket, or a bucket without a value, counts as more than one too.
        """
        found: dict[str, dict[str, int]] = {}
        queries = []
        for feature in self.domain.side_features:
            name = feature.stream_column
            queries.append(
                f"""SELECT '{name}' AS field, value, min(bucket) AS bucket,
                    count(DISTINCT bucket) AS num, min(bucket) > 0 AS is_there
                FROM (SELECT p.{name} AS value, coalesce(h.{name}, 0) AS bucket
                      FROM past p JOIN histories h ON h.instance_id = p.instance_id
                      UNION ALL SELECT {name}, bucket_{feature.name} FROM sample)
                GROUP BY value"""
            )
        if not queries:
            return {}, pa.table({"field": pa.array([], pa.string())})
        pairs = self.table(" UNION ALL ".join(queries))
        for row in pairs.to_pylist():
            found.setdefault(row["field"], {})[row["value"]] = row["bucket"]
        self.sql.register("pairs", pairs)
        wrong = self.table(
            """SELECT field, value, num FROM pairs
            WHERE num > 1 OR is_there != (value IS NOT NULL) ORDER BY ALL"""
        )
        return found, wrong

    def policy(self) -> pa.Table:
        """Tokens and item tokens of the line that are readable at another moment than they should.

        The domain's policy: the midnight after the event's day, plus its delay. Columns: table,
        event_date, available_us, wanted_us, num; the number of rows of all tables is `num_all`.
        """
        delay_us = self.domain.tokens.delay_us
        parts = [
            f"""SELECT '{name}' AS "table", event_date, epoch_us(available_time) AS available_us,
                ((event_date - DATE '1970-01-01')::BIGINT + 1) * 86400000000 + {delay_us}
                AS wanted_us FROM {name} WHERE compressor_line = $line"""
            for name in ("tokens", "item_tokens")
        ]
        return self.table(
            f"""SELECT *, count(*) AS num FROM ({" UNION ALL ".join(parts)})
            GROUP BY ALL ORDER BY ALL""",
            {"line": self.line},
        )

    def strays(self) -> tuple[int, pa.Table]:
        """Number of tokens of the line, and those of no real event (sampled, or not there)."""
        of_line = "FROM tokens WHERE compressor_line = $line"
        total = self.table(f"SELECT count(*) AS num {of_line}", {"line": self.line})
        found = self.table(
            f"""SELECT instance_id, event_date {of_line} AND instance_id NOT IN
            (SELECT instance_id FROM instances WHERE NOT is_sampled) ORDER BY ALL""",
            {"line": self.line},
        )
        return total.column("num")[0].as_py(), found

    def protocol(self, days: Days | None) -> pa.Table:
        """Each version that wrote tokens of the line, and what it says of itself.

        Columns: version, first_day, num, protocol, end (null: no row of its own), ranker_day,
        the first day of the asked ranker rows.
        """
        asked = f"WHERE {days.predicate()}" if days else ""
        return self.table(
            f"""WITH wrote AS (
                SELECT compressor_version AS version, min(event_date) AS first_day, count(*) AS num
                FROM tokens WHERE compressor_line = $line GROUP BY ALL),
            said AS (
                SELECT compressor_version AS version, protocol, "end" FROM compressors
                WHERE compressor_line = $line AND domain = $domain)
            SELECT w.*, s.protocol, s."end",
                   (SELECT min(event_date) FROM samples {asked}) AS ranker_day,
                   (SELECT string_agg(DISTINCT protocol, ', ') FROM said) AS line_protocols
            FROM wrote w LEFT JOIN said s USING (version) ORDER BY version""",
            {"line": self.line, "domain": self.domain.name},
        )

    def item_tokens(self) -> tuple[Array, Array, Array]:
        """Per sample: decayed mean token [n, D] float64 of its item, decayed count [n], is there.

        Tokens of real events of days before the sample's, readable by then; each loses 0.5% a day.
        The count is as of the newest such day.
        """
        found = self.table(
            """SELECT s.k, t.token, date_diff('day', p.event_date, newest) AS age FROM (
                SELECT s.k, s.as_of_us, s.day, s.item_key, max(p.event_date) AS newest
                FROM sample s JOIN past p ON p.item_key = s.item_key AND p.event_date < s.day
                JOIN token t ON t.instance_id = p.instance_id AND t.available_us < s.as_of_us
                GROUP BY ALL) s
            JOIN past p ON p.item_key = s.item_key AND p.event_date < s.day
            JOIN token t ON t.instance_id = p.instance_id AND t.available_us < s.as_of_us"""
        )
        num_samples = len(self.table("SELECT k FROM sample"))
        k, age = (np.asarray(found.column(c).to_numpy(), np.int64) for c in ("k", "age"))
        values = decode(found.column("token"))
        weight = ITEM_DECAY_PER_DAY**age
        count = np.bincount(k, weight, minlength=num_samples)
        total = np.zeros((num_samples, values.shape[1]))
        np.add.at(total, k, values * weight[:, None])
        is_there = count > 0
        total[is_there] /= count[is_there, None]
        return total, count, is_there


def decode(column: pa.ChunkedArray, dtype: str = "<f2") -> npt.NDArray[np.float64]:
    """Stored vectors as [n, D] float64."""
    values = column.to_pylist()
    width = len(values[0]) // np.dtype(dtype).itemsize if values else 0
    return np.frombuffer(b"".join(values), dtype).reshape(len(values), width).astype(np.float64)


def _window(window: int | None) -> str:
    return "all" if window is None else f"last_{window}"
