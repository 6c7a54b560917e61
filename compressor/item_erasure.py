"""Item tokens are sums over users: a user leaves one when it is summed up again from the tokens of
the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import date
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from compressor import codecs, item_state
from compressor.item_tokens import ItemState, advance
from pipelines import delta, forgotten, tables
from pipelines.days import as_number
from pipelines.token_format import TokenFormat, declared, decode


class Sums(NamedTuple):
    """The item tokens of one line that hold some users' tokens."""

    items: pa.Array
    days: list[date]
    """From the users' first day on; what is before holds nothing of theirs."""


def holding(lake: str, domain_name: str, users: Collection[int]) -> dict[str, Sums]:
    """By line, the item tokens into which tokens of the users have been summed."""
    tokens, items = tables.instance_tokens(domain_name), tables.item_tokens(domain_name)
    if not users or not (delta.exists(lake, tokens) and delta.exists(lake, items)):
        return {}
    taken = delta.files(delta.open_table(lake, tokens)).to_table(
        ["compressor_line", "item_id", "event_date"],
        filter=ds.field("user_id").isin(pa.array([*users], pa.int64())),
    )
    found: dict[str, Sums] = {}
    for line in sorted(taken["compressor_line"].unique().to_pylist()):
        of_line = taken.filter(pc.equal(taken["compressor_line"], line))
        kept = of_line["item_id"].unique()
        is_after = ds.field("event_date") >= pc.min(of_line["event_date"])
        is_line = ds.field("compressor_line") == line
        rows = delta.files(delta.open_table(lake, items)).to_table(
            ["event_date"], filter=is_after & is_line & ds.field("item_id").isin(kept)
        )
        if len(rows):
            found[line] = Sums(kept, sorted(rows["event_date"].unique().to_pylist()))
    return found


def erase(
    lake: str,
    domain_name: str,
    users: Collection[int],
    sums: Mapping[str, Sums],
    *,
    commit: Mapping[str, str],
) -> None:
    """Sum up again, from the tokens of everyone else, what the users' tokens are in.

    The rows become those of a lake in which the others' tokens are the same and these users never
    were: days before the first of theirs are taken as they are.
    """
    days = sorted({day for each in sums.values() for day in each.days})

    def changed() -> Callable[[pa.Table], pa.Table]:
        again = {line: _Again(lake, domain_name, line, users, each) for line, each in sums.items()}

        def change(rows: pa.Table) -> pa.Table:
            for each in again.values():
                rows = each.of(rows)
            return rows

        return change

    for line in sums:  # first: once the rows are rewritten, no second try would come here
        item_state.drop(lake, line)
    delta.rewrite(lake, tables.item_tokens(domain_name), days, changed, commit=commit)


class _Again:
    """A line's sums, day after day."""

    def __init__(
        self, lake: str, domain_name: str, line: str, users: Collection[int], sums: Sums
    ) -> None:
        self.table, self.line, self.users, self.sums = (
            tables.item_tokens(domain_name), line, users, sums,
        )  # fmt: skip
        opened = delta.open_table(lake, tables.instance_tokens(domain_name))
        form = declared(delta.open_table(lake, self.table))
        self.tokens = delta.files(opened, sums.days)
        self.form = declared(opened) or TokenFormat()
        self.width = form.width if form else self.form.width
        self.state = ItemState.before(lake, domain_name, line, sums.days[0], self.width)

    def of(self, rows: pa.Table) -> pa.Table:
        """A day's rows of all lines, this line's summed up again."""
        is_ours = pc.and_(
            pc.equal(rows["compressor_line"], self.line),
            pc.is_in(rows["item_id"], self.sums.items),
        )
        old = rows.filter(is_ours)
        if not len(old):
            return rows
        day = old["event_date"][0].as_py()
        found = self.tokens.to_table(
            ["instance_id", "user_id", "item_id", "event_time", "user_bucket", "token"],
            filter=(ds.field("compressor_line") == self.line)
            & (ds.field("event_date") == day)
            & ds.field("item_id").isin(self.sums.items),
        )
        kept = forgotten.without(found, self.users).sort_by(
            [(name, "ascending") for name in tables.USER_MAJOR]
        )
        token = decode(kept["token"].combine_chunks(), self.form)
        item_id = np.asarray(kept["item_id"].to_numpy())
        self.state, new = advance(self.state, item_id, token, as_number(day))
        columns = {
            name: pa.array([old[name][0].as_py()] * len(new), old.schema.field(name).type)
            for name in ("compressor_line", "compressor_version", "available_time", "event_date")
        }
        columns |= {
            "item_id": new.item_id,
            "decayed_sum": codecs.encode(new.decayed_sum, "float32"),
            "decayed_count": new.decayed_count,
        }
        names = self.table.schema.names
        summed = pa.table(columns).select(names).cast(self.table.schema)
        order = dict.fromkeys((*self.table.partition_by, *self.table.sort_by))
        return pa.concat_tables([rows.filter(pc.invert(is_ours)), summed]).sort_by(
            [(name, "ascending") for name in order]
        )
