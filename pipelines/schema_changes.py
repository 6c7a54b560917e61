"""What may become of a table's feature columns: one may be added, what one holds never changes.

Each feature's column carries the feature's meaning as its metadata in the table's own schema
(`tables.FEATURE`): it comes with the commit that adds the column, Spark and delta-rs both keep it,
and Delta lets no writer pass a change of schema that it has not seen. As meanings only ever come
to be, a writer that once saw all of its columns as it declares them is right at every later
version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from pipelines.errors import InputError
from pipelines.tables import Table

WAYS_OUT = (
    "Put the domain file back as it was; or declare what is new as a feature of another name; or "
    "give the domain another `name`, under which all days are built anew (iat build)"
)


def check_meanings(table: Table, stored: Mapping[str, str | None]) -> None:
    """InputError where a stored feature means something else than the domain file declares.

    Args:
        stored: the table's columns in the lake, with their metadata `tables.FEATURE`; a column
            written before there was any is taken as it is.
    """
    changed = [
        f"feature {_name(column)!r} was stored with {_told(held, wanted)} and the domain file now "
        f"says {_told(wanted, held)}"
        for column, wanted in table.meanings.items()
        if (held := stored.get(column)) is not None and json.loads(held) != json.loads(wanted)
    ]
    _refuse(table, changed)


def check_all(table: Table, stored: Mapping[str, str | None]) -> None:
    """InputError, too, where a stored feature is no longer declared: what a writer must ask."""
    check_meanings(table, stored)
    _refuse(
        table,
        [
            f"feature {_name(column)!r} is stored and the domain file has it no longer"
            for column, meaning in stored.items()
            if meaning is not None and column not in table.schema.names
        ],
    )


def added(table: Table, stored: Mapping[str, str | None]) -> list[str]:
    """Columns of features that the table in the lake does not have yet."""
    return [column for column in table.meanings if column not in stored]


def _refuse(table: Table, reasons: list[str]) -> None:
    if reasons:
        raise InputError(
            f"{table.name}: {'; '.join(reasons)}. What is stored keeps its meaning, so nothing was "
            f"read or written. {WAYS_OUT}"
        )


def _name(column: str) -> str:
    return column.removeprefix("f_")


def _told(meaning: str, other: str) -> str:
    """What one meaning says where another differs."""
    one, two = json.loads(meaning), json.loads(other)
    keys = sorted(k for k in {*one, *two} if one.get(k) != two.get(k))
    return ", ".join(
        f"{key} = {json.dumps(one[key])}" if key in one else f"no {key}" for key in keys
    )
