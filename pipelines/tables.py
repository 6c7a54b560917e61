"""Every Delta table of the lake, declared once: name, Arrow schema, key, partition columns, order
inside a file.

Tables of instances depend on their domain's features and labels, so each is a function of the
domain.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa

from pipelines.domain import Domain, Feature

UTC_TIME = pa.timestamp("us", tz="UTC")

KEYS = (
    ("instance_id", pa.int64()),
    ("user_id", pa.int64()),
    ("item_id", pa.int64()),
    ("request_id", pa.int64()),
    ("event_time", UTC_TIME),
    ("is_sampled", pa.bool_()),
)
TEMPORAL = ("event_time", "instance_id")
NUM_BUCKETS = 16
"""User buckets: a user's rows are in bucket user_id mod this, in every table sorted by user."""
USER_MAJOR = ("user_bucket", "user_id", "event_time", "instance_id")
FEATURE = "iat.feature"
"""Metadata of a feature's column, in the table's own schema: the feature's meaning, as JSON."""
Column: TypeAlias = tuple[str, pa.DataType] | pa.Field


@dataclass(frozen=True, slots=True)
class Table:
    """One declared table; `name` is its path below the lake."""

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    partition_by: tuple[str, ...]
    sort_by: tuple[str, ...] = ()

    @property
    def meanings(self) -> dict[str, str]:
        """What each feature's column holds, as JSON, by column."""
        return {f.name: f.metadata[FEATURE.encode()].decode() for f in self.schema if _has(f)}

    def missing(self, column: str) -> Any:
        """What a day written before the column was there holds in it: what a null raw value gives.

        A hashed value 0, a list of them none; every other one is null.
        """
        field = self.schema.field(column)
        return {pa.int32(): 0, pa.list_(pa.int32()): []}.get(field.type) if _has(field) else None


def instances(domain: Domain) -> Table:
    """One logged or sampled instance with readable feature values, labels and their label_time."""
    columns = [
        *KEYS,
        ("user_key", pa.string()),
        ("item_key", pa.string()),
        ("request_key", pa.string()),
        *(_column(f, _readable(f)) for f in domain.features),
        *_labels(domain),
    ]
    return _daily(f"instances/{domain.name}", columns, key=("instance_id",), sort_by=TEMPORAL)


def quarantine(domain: Domain) -> Table:
    """One rejected event: the raw row as JSON, the rule it broke, the day it was met for."""
    columns = [("raw", pa.string()), ("rule", pa.string()), ("run", pa.string())]
    return _daily(f"quarantine/{domain.name}", columns, key=(), sort_by=("rule",))


def raw_files(domain: Domain) -> Table:
    """What each file of the raw log held of each day (null: of no day) when it was last opened."""
    columns = [
        ("file", pa.string()),
        ("stamp", pa.string()),
        ("event_date", pa.date32()),
        ("num_events", pa.int64()),
        ("content", pa.decimal128(38, 0)),
    ]
    key = ("file", "event_date")
    return Table(f"raw_files/{domain.name}", pa.schema(columns), key, (), ("file",))


def temporal_order(domain: Domain) -> Table:
    """Model-ready instances, a day's rows in time order."""
    columns = [*KEYS, *_features(domain.features), *_labels(domain)]
    return _daily(f"temporal_order/{domain.name}", columns, key=("instance_id",), sort_by=TEMPORAL)


def user_order(domain: Domain) -> Table:
    """The same model-ready instances, a user's rows together in time order within the day."""
    columns = [*KEYS, ("user_bucket", pa.int32()), *_features(domain.features), *_labels(domain)]
    return _daily(f"user_order/{domain.name}", columns, key=("instance_id",), sort_by=USER_MAJOR)


def stream(domain: Domain, order: str) -> Table:
    """The stream that a compressor of an order (user or temporal) reads."""
    return user_order(domain) if order == "user" else temporal_order(domain)


def histories(domain: Domain) -> Table:
    """Keys and side information of real events (never sampled negatives), user-major within the
    day.

    Side information: the categorical item fields' hashed values, every label with its label_time.
    """
    columns = [
        *KEYS[:5],
        ("user_bucket", pa.int32()),
        *_features(domain.side_features),
        *_labels(domain),
    ]
    return _daily(f"histories/{domain.name}", columns, key=("instance_id",), sort_by=USER_MAJOR)


def ranker_samples(domain: Domain) -> Table:
    """One (request, candidate): user, as_of, target features known at the request, labels. A
    pointer, never a history."""
    at_request = tuple(f for f in domain.features if f.known == "request")
    columns = [
        *KEYS[:4],
        ("as_of", UTC_TIME),
        ("is_sampled", pa.bool_()),
        *_features(at_request),
        *_labels(domain),
    ]
    return _daily(
        f"ranker_samples/{domain.name}",
        columns,
        key=("instance_id",),
        sort_by=("as_of", "request_id", "instance_id"),
    )


def instance_tokens(domain_name: str) -> Table:
    """One token of one real event, written once per compressor line; bytes as the codec says."""
    columns = [
        *KEYS[:3],
        KEYS[4],
        ("user_bucket", pa.int32()),
        ("compressor_line", pa.string()),
        ("compressor_version", pa.string()),
        ("available_time", UTC_TIME),
        ("token", pa.binary()),
    ]
    return _by_line(
        f"instance_tokens/{domain_name}",
        columns,
        key=("compressor_line", "instance_id"),
        sort_by=USER_MAJOR,
    )


def materialized(domain: Domain) -> Table:
    """One ranker sample with its user's past written out, as `TokenStore.fetch` gives it for one
    line: lists of exactly `iat.length` entries (a table property), oldest first, padded in front.

    A side column that came later than a day reads as the empty list there: all of it missing. The
    rest of a sample is in `ranker_samples`, under the same event_date and instance_id.
    """
    columns = [
        *KEYS[:4],
        ("as_of", UTC_TIME),
        ("is_sampled", pa.bool_()),
        ("compressor_line", pa.string()),
        ("token", pa.list_(pa.binary())),
        ("mask", pa.list_(pa.bool_())),
        ("token_mask", pa.list_(pa.bool_())),
        ("gap_s", pa.list_(pa.float32())),
        *(_column(f, pa.list_(pa.int32())) for f in domain.side_features),
        *((f"label_{label.name}", pa.list_(pa.int32())) for label in domain.labels),
    ]
    return _by_line(
        f"materialized/{domain.name}",
        columns,
        key=("compressor_line", "instance_id"),
        sort_by=("user_id", "as_of", "instance_id"),
    )


def item_tokens(domain_name: str) -> Table:
    """One item on one day it occurred: decayed sum of its tokens (float32 x D bytes) and decayed
    count up to that day."""
    columns = [
        ("item_id", pa.int64()),
        ("compressor_line", pa.string()),
        ("compressor_version", pa.string()),
        ("available_time", UTC_TIME),
        ("decayed_sum", pa.binary()),
        ("decayed_count", pa.float32()),
    ]
    return _by_line(
        f"item_tokens/{domain_name}",
        columns,
        key=("compressor_line", "event_date", "item_id"),
        sort_by=("item_id",),
    )


def compressor_versions() -> Table:
    """Lineage of every version: parent, days, stream, metrics, status, artifact."""
    columns = [
        ("compressor_line", pa.string()),
        ("compressor_version", pa.string()),
        ("parent_version", pa.string()),
        ("domain", pa.string()),
        ("order", pa.string()),
        ("protocol", pa.string()),
        ("start", pa.date32()),
        ("end", pa.date32()),
        ("status", pa.string()),
        ("width", pa.int32()),
        ("codec", pa.string()),
        ("config", pa.string()),
        ("metrics", pa.string()),
        ("input_versions", pa.string()),
        ("artifact", pa.string()),
    ]
    return Table(
        "compressor_versions",
        pa.schema(columns),
        ("compressor_line", "compressor_version"),
        ("compressor_line",),
    )


def approvals() -> Table:
    """The compressor line of a domain that daily runs walk and rankers are told to read, and those
    it came after (newest first): a row a domain."""
    columns = [
        ("domain", pa.string()),
        ("line", pa.string()),
        ("earlier", pa.list_(pa.string())),
        ("evidence", pa.string()),
    ]
    return Table("approvals", pa.schema(columns), ("domain",), ("domain",))


def forgotten(domain: Domain) -> Table:
    """One user who was erased and may not come back: the hash, and nothing readable."""
    schema = pa.schema([("user_id", pa.int64())])
    return Table(f"forgotten/{domain.name}", schema, ("user_id",), ())


def manifests() -> Table:
    """One training run whose inputs vacuum keeps: a row until it is released."""
    columns = [
        ("name", pa.string()),
        ("domain", pa.string()),
        ("job", pa.string()),
        ("place", pa.string()),
        ("manifest", pa.string()),
    ]
    return Table("manifests", pa.schema(columns), ("name",), ())


def job_reports() -> Table:
    """One row per job run: what it read and wrote, how long it took, on what."""
    columns = [
        ("run_date", pa.date32()),
        ("job", pa.string()),
        ("run", pa.string()),
        ("started", UTC_TIME),
        ("wall_s", pa.float64()),
        ("report", pa.string()),
    ]
    return Table("job_reports", pa.schema(columns), ("run",), ("run_date",))


def _daily(
    name: str,
    columns: Sequence[Column],
    *,
    key: tuple[str, ...],
    sort_by: tuple[str, ...],
) -> Table:
    return Table(
        name, pa.schema([*columns, ("event_date", pa.date32())]), key, ("event_date",), sort_by
    )


def _by_line(
    name: str,
    columns: Sequence[Column],
    *,
    key: tuple[str, ...],
    sort_by: tuple[str, ...],
) -> Table:
    return Table(
        name,
        pa.schema([*columns, ("event_date", pa.date32())]),
        key,
        ("compressor_line", "event_date"),
        sort_by,
    )


def _features(features: tuple[Feature, ...]) -> list[pa.Field]:
    """Hashed categories (0: missing) and scaled numbers (null: missing)."""
    return [_column(f, _model_ready(f)) for f in features]


def _column(feature: Feature, kind: pa.DataType) -> pa.Field:
    meaning = json.dumps(feature.meaning, sort_keys=True)
    return pa.field(feature.stream_column, kind, metadata={FEATURE: meaning})


def _has(field: pa.Field) -> bool:
    return FEATURE.encode() in (field.metadata or {})


def _readable(feature: Feature) -> pa.DataType:
    if feature.is_number:
        return pa.float64()
    return pa.list_(pa.string()) if feature.is_list else pa.string()


def _model_ready(feature: Feature) -> pa.DataType:
    if feature.is_number:
        return pa.float32()
    return pa.list_(pa.int32()) if feature.is_list else pa.int32()


def _labels(domain: Domain) -> list[Column]:
    """0, 1 or null (unknown), and when each became known."""
    return [
        column
        for label in domain.labels
        for column in ((f"label_{label.name}", pa.int8()), (f"label_time_{label.name}", UTC_TIME))
    ]
