"""Raw events -> instances with readable values; what cannot be one is kept apart with its reason.

Spark expressions only. Sessions run in UTC (jobs/spark.py), so days and hours are UTC's.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, MapType

from pipelines import tables
from pipelines.days import Days
from pipelines.domain import Domain, Feature, Label, check_columns
from pipelines.forgotten import BROKEN_ROW
from pipelines.raw_values import list_of, microseconds, moment, number, text

DERIVED = {
    "hour": F.hour,
    "weekday": F.weekday,
    "month": F.month,
    "day-of-year": F.dayofyear,
}
"""weekday: 0 is Monday."""


def instances(
    events: DataFrame, domain: Domain, days: Days, *, run: str
) -> tuple[DataFrame, DataFrame]:
    """The instances of `days`, and the rejected events with the rule each broke.

    Events outside `days` are in neither. See `checked` for the rules.
    """
    rows = checked(events, domain, days)
    return accepted(rows, domain), rejected(rows, run=run)


def checked(events: DataFrame, domain: Domain, days: Days) -> DataFrame:
    """Every event of `days` as an instance, with the first rule it breaks (null: none) and then
    its raw row.

    Rules: bad_row (see BROKEN_ROW), null_user, null_item, bad_time, future (at or after
    limits.latest), bad_label:NAME (not 0 or 1, or no number), bad_label_time:NAME,
    label_before_event:NAME, bad_number:NAME, not_finite:NAME, duplicate (same user, item, request
    and time: one is kept, whatever the order of the log).
    A bad row, and an event whose time is no time or in the future, belong to no day: they stand
    under `days.start`.
    Errors: InputError if a column is missing or of a type that cannot serve.
    """
    check_columns(domain, events.columns)
    raw = _Raw(events, domain)
    rows = raw.rows.withColumn("event_time", raw.event_time)
    placed = rows.withColumn("event_date", F.coalesce(_day(domain), F.lit(days.start)))
    asked = placed.where((F.col("event_date") >= days.start) & (F.col("event_date") < days.end))
    keyed = asked.select(
        "raw",
        "event_time",
        "event_date",
        raw.broken_rule().alias("rule"),
        instance_id(domain, raw.user_key, raw.item_key, raw.request_key).alias("instance_id"),
        raw.fingerprint().alias("fingerprint"),
    )
    # A day's rows in one task: the next steps (negatives, the sorted file) need them together too.
    same = Window.partitionBy("event_date", "instance_id")
    first = same.orderBy(F.col("rule").isNotNull(), "fingerprint")
    ranked = keyed.repartition("event_date").withColumn("copy", F.row_number().over(first))
    ruled = ranked.withColumn("rule", F.coalesce("rule", F.when(F.col("copy") > 1, "duplicate")))
    as_json = F.to_json("raw", {"ignoreNullFields": "false"})
    return ruled.select(
        *(value.alias(name) for name, value in raw.instance_columns().items()),
        "rule",
        F.when(F.col("rule").isNotNull(), as_json).alias("raw"),
    )


def accepted(rows: DataFrame, domain: Domain) -> DataFrame:
    """Of what `checked` gave: the instances, as their table is declared."""
    return rows.where(F.col("rule").isNull()).select(*tables.instances(domain).schema.names)


def rejected(rows: DataFrame, *, run: str) -> DataFrame:
    """Of what `checked` gave: the quarantine; `run` names the run that met them."""
    found = rows.where(F.col("rule").isNotNull())
    return found.select("raw", "rule", F.lit(run).alias("run"), "event_date")


def days_in(events: DataFrame, domain: Domain) -> DataFrame:
    """Of each file and day (null: no readable time): num_events and content, which is the same for
    the same events in any order.

    Columns file (URL-encoded), event_date, num_events, content; future days are days here.
    """
    check_columns(domain, events.columns)
    raw = _Raw(events, domain)
    rows = events.select(F.struct("*").alias("raw"), F.col("_metadata.file_path").alias("file"))
    dated = rows.withColumn("event_date", F.to_date(raw.event_time))
    content = F.sum(raw.fingerprint().cast("decimal(20,0)")).alias("content")
    return dated.groupBy("file", "event_date").agg(F.count("*").alias("num_events"), content)


def instance_id(
    domain: Domain, user: Column, item: Column, request: Column, *origin: Column
) -> Column:
    """Key of an instance; a sampled one hashes its positive's id (`origin`) too.

    Two positives of one request may sample the same item: without the origin they would be one row.
    """
    moment, is_sampled = F.unix_micros("event_time"), F.lit(bool(origin))
    return F.xxhash64(F.lit(domain.name), user, item, request, moment, is_sampled, *origin)


def _day(domain: Domain) -> Column:
    """The day an event belongs to; null if it has no time or one in the future."""
    day = F.to_date("event_time")
    return (
        F.when(day < F.lit(domain.limits.latest).cast("date"), day) if domain.limits.latest else day
    )


class _Raw:
    """The raw row as one struct column `raw` (its names never meet ours), and what is read from
    it."""

    def __init__(self, events: DataFrame, domain: Domain) -> None:
        self.domain = domain
        self.types: dict[str, DataType] = {f.name: f.dataType for f in events.schema}
        self.rows = events.select(F.struct("*").alias("raw"))
        columns = domain.columns
        self.user_key = self._text(columns.user, "columns.user")
        self.item_key = self._text(columns.item, "columns.item")
        moment = F.unix_micros("event_time").cast("string")
        request = self._text(columns.request, "columns.request") if columns.request else F.lit(None)
        self.request_key = F.coalesce(request, moment)
        self.is_whole = (
            self._of(BROKEN_ROW)[0].isNull() if BROKEN_ROW in self.types else F.lit(True)
        )
        self.event_time = F.when(self.is_whole, self._time(columns.time, "columns.time"))

    def _of(self, name: str) -> tuple[Column, DataType]:
        return F.col("raw").getField(name), self.types[name]

    def _text(self, name: str, where: str) -> Column:
        return text(*self._of(name), where)

    def _time(self, name: str, where: str) -> Column:
        return moment(*self._of(name), self.domain.columns.time_unit, where)

    def _given(self, name: str) -> Column:
        """Whether the raw value is there at all (an empty string is not)."""
        value, kind = self._of(name)
        return value.isNotNull() & (
            F.trim(value) != "" if kind.typeName() == "string" else F.lit(True)
        )

    def fingerprint(self) -> Column:
        """A hash of the whole raw row (maps cannot be hashed), that a null cannot shift, and a
        column that is null not change."""
        names = [name for name, kind in self.types.items() if not _has_map(kind)]
        values = {name: self._of(name)[0] for name in names}
        named = (F.when(v.isNotNull(), F.struct(F.lit(n), v)) for n, v in values.items())
        return F.xxhash64(*named)

    def broken_rule(self) -> Column:
        """The first rule that the row breaks, null if none."""
        latest = self.domain.limits.latest
        rules = {
            "bad_row": ~self.is_whole,
            "null_user": self.user_key.isNull(),
            "null_item": self.item_key.isNull(),
            "bad_time": F.col("event_time").isNull(),
            "future": F.to_date("event_time") >= F.lit(latest or None).cast("date"),
        }
        for label in self.domain.labels:
            rules |= self._label_rules(label)
        for feature in self.domain.features:
            if feature.is_number and feature.column:
                value = number(*self._of(feature.column), f"feature {feature.name!r}")
                rules[f"bad_number:{feature.name}"] = self._given(feature.column) & value.isNull()
                rules[f"not_finite:{feature.name}"] = ~_is_finite(value)
        return F.coalesce(*(F.when(broken, F.lit(rule)) for rule, broken in rules.items()))

    def _label_rules(self, label: Label) -> dict[str, Column]:
        rules: dict[str, Column] = {}
        if label.column:
            value = number(*self._of(label.column), f"label {label.name!r}")
            is_bad = (self._given(label.column) & value.isNull()) | ~_is_finite(value)
            if label.at_least is None:
                is_bad = is_bad | ~value.isin(0.0, 1.0)
            rules[f"bad_label:{label.name}"] = is_bad
        if label.time_column:
            known = self._time(label.time_column, f"label {label.name!r} time_column")
            rules[f"bad_label_time:{label.name}"] = self._given(label.time_column) & known.isNull()
            rules[f"label_before_event:{label.name}"] = known < F.col("event_time")
        return rules

    def label(self, label: Label) -> tuple[Column, Column]:
        """0, 1 or null (unknown), and when it became known (null: not within its window).

        A label whose time column is empty is known when its window closes.
        """
        if label.always is not None:
            value = F.lit(label.always)
        else:
            value = number(*self._of(label.column), f"label {label.name!r}")
            value = value if label.at_least is None else value >= F.lit(label.at_least)
        event_us = F.unix_micros("event_time")
        known_us = event_us + microseconds(label.delay)
        last_us = event_us + microseconds(label.window)
        if label.time_column:
            known = self._time(label.time_column, f"label {label.name!r} time_column")
            known_us = F.coalesce(F.unix_micros(known), last_us)
        is_known = value.isNotNull() & (known_us <= last_us)
        return (
            F.when(is_known, value).cast("tinyint"),
            F.when(is_known, F.timestamp_micros(known_us)),
        )

    def feature(self, feature: Feature) -> Column:
        """The readable value: text, list of text or double; null is missing."""
        if feature.derive is not None:
            derived = DERIVED[feature.derive]("event_time").cast("string")
            if feature.is_number:
                return derived.cast("double")
            return F.array(derived) if feature.is_list else derived
        raw, where = self._of(feature.column), f"feature {feature.name!r}"
        if feature.is_number:
            return number(*raw, where)
        if feature.is_list:
            return list_of(*raw, feature.separator, where)
        return text(*raw, where)

    def instance_columns(self) -> dict[str, Column]:
        """Every column of the instances table, by name."""
        columns = {
            "instance_id": F.col("instance_id"),
            "user_id": F.xxhash64(self.user_key),
            "item_id": F.xxhash64(self.item_key),
            "request_id": F.xxhash64(self.user_key, self.request_key),
            "event_time": F.col("event_time"),
            "is_sampled": F.lit(False),
            "user_key": self.user_key,
            "item_key": self.item_key,
            "request_key": self.request_key,
        }
        columns |= {f.stream_column: self.feature(f) for f in self.domain.features}
        for label in self.domain.labels:
            value, known = self.label(label)
            columns |= {f"label_{label.name}": value, f"label_time_{label.name}": known}
        return columns | {"event_date": F.col("event_date")}


def _is_finite(value: Column) -> Column:
    return ~F.isnan(value) & (F.abs(value) != float("inf"))


def _has_map(kind: DataType) -> bool:
    return isinstance(kind, MapType) or "map<" in kind.simpleString()
