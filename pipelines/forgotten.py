"""Users who were erased: who they are, which rows are theirs, and that no job brings them back."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import delta, tables
from pipelines.domain import Domain
from pipelines.errors import RetryableError
from pipelines.keys import key_id, key_text

BROKEN_ROW = "_broken_row"
"""A raw column of this name holds what could not be split into the others, else null."""
BETWEEN = r"[\"',;|\t\r\n]+"
"""What stands between the values of a broken row."""
AT_ONCE = 1_000


def ids(lake: str, domain: Domain) -> frozenset[int]:
    """The user_ids of everyone whom the domain has forgotten."""
    table = tables.forgotten(domain)
    if not delta.exists(lake, table):
        return frozenset()
    return frozenset(delta.read(lake, table)["user_id"].to_pylist())


def add(lake: str, domain: Domain, users: Collection[int], *, commit: Mapping[str, str]) -> None:
    """From this commit on no job writes a row of these users."""
    new = sorted(set(users) - ids(lake, domain))
    table = tables.forgotten(domain)
    for at in range(0, len(new), AT_ONCE):
        part = new[at : at + AT_ONCE]
        where = f"user_id IN ({_listed(part)})"
        delta.replace(
            lake, table, pa.table({"user_id": part}, table.schema), None, commit=commit, where=where
        )


@contextmanager
def kept_out(lake: str, domain: Domain) -> Iterator[frozenset[int]]:
    """The forgotten, of whom the block must write nothing.

    RetryableError where more were forgotten before its end: it has read them, and perhaps written
    them after they had been erased. The same command, run again, writes the days without them.
    """
    before = ids(lake, domain)
    yield before
    late = ids(lake, domain) - before
    if late:
        raise RetryableError(
            f"{len(late)} users of {domain.name} were forgotten while this ran, and what it wrote "
            "may hold them"
        )


def without(rows: pa.Table, users: Collection[int]) -> pa.Table:
    """The rows of everyone else."""
    if not users:
        return rows
    return rows.filter(pc.invert(pc.is_in(rows["user_id"], pa.array([*users], pa.int64()))))


def is_other(users: Collection[int]) -> str:
    """SQL for Spark: whether a row's user_id is of nobody of the users."""
    return f"user_id NOT IN ({_listed(users)})" if users else "true"


def is_theirs(users: Collection[int]) -> str:
    """SQL for Spark: whether a row of `pipelines.instances.checked` is of one of the users.

    The user of a broken row is unknown: it is theirs if any of its values is their key.
    """
    if not users:
        return "false"
    listed, text = _listed(users), f"get_json_object(raw, '$.{BROKEN_ROW}')"
    between = BETWEEN.replace("\\", "\\\\").replace("'", "\\'")
    has_key = f"exists(split({text}, '{between}'), part -> xxhash64(trim(part)) IN ({listed}))"
    return f"(user_id IN ({listed}) OR coalesce({has_key}, false))"


def of_raw(raw: pa.ChunkedArray, domain: Domain, users: Collection[int]) -> pa.Array:
    """Whether each raw row (JSON, as in quarantine) is of one of the users; as `is_theirs`."""

    def is_one(text: str) -> bool:
        row = json.loads(text)
        parts = [row.get(domain.columns.user)]
        parts += [part.strip() for part in re.split(BETWEEN, row.get(BROKEN_ROW) or "")]
        return any(key and key_id(key) in users for key in map(key_text, parts))

    return pa.array([text is not None and is_one(text) for text in raw.to_pylist()], pa.bool_())


def of_keys(column: pa.ChunkedArray, users: Collection[int]) -> pa.Array:
    """Whether each raw value of a user column is the key of one of the users."""
    values = column.unique().to_pylist()
    theirs = [key is not None and key_id(key) in users for key in map(key_text, values)]
    place = pc.index_in(column, pa.array(values, column.type)).to_numpy(zero_copy_only=False)
    return pa.array(np.asarray(theirs, bool)[place.astype(np.int64)] if len(column) else [])


def _listed(users: Collection[int]) -> str:
    return ", ".join(str(int(user)) for user in sorted(users))
