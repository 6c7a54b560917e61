"""What a ranker would read of one user as of a moment: events, tokens, labels known by then."""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import torch

from downstream.token_store import Tokens
from downstream.user_index import IndexStore, UserIndex
from pipelines import delta, tables
from pipelines.days import Days, to_us
from pipelines.domain import Domain, load
from pipelines.errors import InputError
from pipelines.features import NEVER_US
from pipelines.keys import key_id

log = logging.getLogger(__name__)

FIRST_DAY = datetime(1, 1, 1, tzinfo=UTC).date()
LABELS = ("unknown", "negative", "positive")
UNITS = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))


@dataclass(frozen=True, kw_only=True)
class Args:
    """Print a user's last events strictly before a moment, as a ranker of that moment reads them.

    A token shows its norm, `later` if it was published only at or after the moment, `none` if it
    was never written. A label shows what was known by then.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder of the Delta tables."""
    user: str
    """The user's key, as the log writes it."""
    as_of: str
    """The moment, ISO 8601, such as 2017-06-30T12:00; UTC unless it says otherwise."""
    line: str = ""
    """Compressor line whose tokens to read; empty: events only."""
    length: int = 20
    """At most this many events, the newest ones."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise InputError(f"--length must be at least 1, got {self.length}")
        _ = self.moment

    @property
    def moment(self) -> datetime:
        try:
            found = datetime.fromisoformat(self.as_of)
        except ValueError as error:
            raise InputError(
                f"--as-of must be ISO 8601, such as 2017-06-30T12:00; got {self.as_of!r}"
            ) from error
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def main(args: Args) -> dict[str, Any]:
    found = fetch(
        load(args.domain), args.lake, args.line or None, args.user, args.moment, args.length
    )
    sys.stdout.write(as_text(found))
    return found


def fetch(
    domain: Domain, lake: str, line: str | None, user: str, as_of: datetime, length: int
) -> dict[str, Any]:
    """The fetched events, oldest first, with readable values where the lake has `instances`."""
    user_id = key_id(user)
    days = Days(FIRST_DAY, as_of.date() + timedelta(days=1))
    lines = [] if line is None else [line]
    with tempfile.TemporaryDirectory(prefix="iat-fetch-") as folder:
        index = UserIndex.build(
            lake, domain, Path(folder) / "index", days=days, lines=lines, only_users=[user_id]
        )
        store = IndexStore(index, line)
        moment = torch.tensor([to_us(as_of)])
        tokens = store.fetch(torch.tensor([user_id]), moment, length)
        readable = _readable(domain, lake, user_id, days)
        events = _events(store, tokens, readable)
    return {
        "domain": domain.name,
        "line": line,
        "user": user,
        "user_id": user_id,
        "as_of": as_of.isoformat(),
        "is_known": len(index) > 0,
        "token_width": store.width,
        "tables": index.meta.tables,
        "events": events,
    }


def _events(
    store: IndexStore, tokens: Tokens, readable: dict[int, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One entry per event; a norm is None unless its token could be read by then."""
    arrays = store.index.arrays
    norms = tokens.token_BLD[0].float().norm(dim=-1)
    found = []
    for at in tokens.mask_BL[0].nonzero().flatten().tolist():
        row = int(tokens.row_BL[0, at])
        instance_id = int(arrays["instance_id"][row])
        is_written = bool(store.available_us_N[row] < NEVER_US)
        token = "read" if tokens.token_mask_BL[0, at] else "later" if is_written else "none"
        side = {name: int(column[0, at]) for name, column in tokens.side.items()}
        values = readable.get(instance_id, {})
        found.append(
            {
                "event_time": _iso(int(arrays["event_time_us"][row])),
                "instance_id": instance_id,
                "item_id": int(arrays["item_id"][row]),
                "item": values.get("item_key"),
                "gap_s": float(tokens.gap_s_BL[0, at]),
                "token": token,
                "token_norm": round(float(norms[at]), 4) if token == "read" else None,
                "buckets": {n: side[n] for n in store.index.meta.side},
                "values": {n: values[n] for n in store.index.meta.side if n in values},
                "labels": {n: LABELS[side[f"label_{n}"]] for n in store.index.meta.labels},
            }
        )
    return found


def _readable(domain: Domain, lake: str, user_id: int, days: Days) -> dict[int, dict[str, Any]]:
    """instance_id -> item key and item fields as logged; empty without an `instances` table."""
    table = tables.instances(domain)
    if not delta.exists(lake, table):
        return {}
    wanted = ["instance_id", "item_key", *(f.stream_column for f in domain.side_features)]
    opened, until = delta.open_table(lake, table), Days(date.min, days.end)
    kept = ds.field("user_id") == user_id
    rows = delta.scan(opened, table, wanted, kept, days=until).to_table().to_pylist()
    return {row.pop("instance_id"): row for row in rows}


def as_text(found: dict[str, Any]) -> str:
    """The events as a table for people."""
    head = f"user {found['user']} (id {found['user_id']}) as of {found['as_of']}"
    if not found["events"]:
        why = "no event before then" if found["is_known"] else f"not in {found['domain']} by then"
        return f"{head}: {why}\n"
    first = found["events"][0]
    side, labels = list(first["buckets"]), list(first["labels"])
    title = ["event time", "ago", "item", "token", *(n.removeprefix("f_") for n in side), *labels]
    rows = [
        [
            event["event_time"].removesuffix("+00:00"),
            _ago(event["gap_s"]),
            event["item"] or str(event["item_id"]),
            event["token"] if event["token_norm"] is None else f"{event['token_norm']:.3f}",
            *(str(event["values"].get(n, f"#{event['buckets'][n]}") or "-") for n in side),
            *(event["labels"][n] for n in labels),
        ]
        for event in found["events"]
    ]
    if found["line"] is None:
        title, rows = [x for i, x in enumerate(title) if i != 3], [r[:3] + r[4:] for r in rows]
    widths = [max(map(len, column)) for column in zip(title, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (title, *rows)
    ]
    read = sum(event["token"] == "read" for event in found["events"])
    last = f"{len(rows)} events"
    if found["line"] is not None:
        last += (
            f", {read} tokens of line {found['line']} (norms shown, width {found['token_width']})"
        )
    return "\n".join([head, *lines, last]) + "\n"


def _ago(gap_s: float) -> str:
    """A duration in its largest whole unit, with one digit."""
    size, unit = next((u for u in UNITS if gap_s >= u[0]), UNITS[-1])
    return f"{gap_s / size:.1f}{unit}"


def _iso(time_us: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_us)).isoformat()
