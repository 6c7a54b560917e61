"""Two domains that share users, in real tables: what a user did in one decides, or not, what they
do in the other.

Every day a user sees `CANDIDATES` items in the target at one instant. In the source each of their
events holds, in its token, a mark of +1 or -1; the target's labels of a day depend on the mark of
the source's last day before it (or, where nothing is shared, on nothing of the source).
"""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import delta, tables
from pipelines.domain import Domain, parse
from pipelines.token_format import TokenFormat, declare, encode

FIRST, NUM_DAYS, CANDIDATES, WIDTH = date(2024, 3, 1), 9, 4, 4
DAY_US = 86_400_000_000
START_US = (FIRST - date(1970, 1, 1)).days * DAY_US
COMMIT = {"job": "test"}
PULL = 2.5
"""Of the mark, in the target's logit."""


def domain(name: str) -> Domain:
    return parse(
        {
            "name": name,
            "source": {"path": "nowhere.parquet"},
            "columns": {"user": "u", "item": "i", "time": "t"},
            "label": [{"name": "buy", "column": "buy"}],
            "feature": [
                {"name": "item", "column": "i", "side": "item", "buckets": 64},
                {"name": "store", "column": "s", "buckets": 16},
            ],
        }
    )


def make_world(
    lake: Path, *, pull: float = PULL, num_users: int = 120, seed: int = 0, first_user: int = 0
) -> str:
    """Domains `shop` (the target), `ads` (holds the marks), `news` (tokens of noise); each with the
    line of its name."""
    random = np.random.default_rng(seed)
    mark = random.choice([-1.0, 1.0], (num_users, NUM_DAYS))
    seen = np.concatenate([np.zeros((num_users, 1)), mark[:, :-1]], axis=1)
    place = str(lake)
    for name in ("shop", "ads", "news"):
        num = CANDIDATES if name == "shop" else 2
        user, day, candidate = (x.ravel() for x in np.indices((num_users, NUM_DAYS, num)))
        # Quarters of a day: many at midnight, where tokens become readable, and many ties.
        time_us = START_US + (day * 4 + random.integers(0, 4, (num_users, NUM_DAYS, 1))
                              .repeat(num, 2).ravel()) * (DAY_US // 4)  # fmt: skip
        item = random.integers(0, 20, len(user))
        logit = np.linspace(-1, 1, 20)[item]
        logit = logit + pull * seen[user, day] if name == "shop" else logit
        token = 0.1 * random.standard_normal((len(user), WIDTH))
        token[:, 0] += mark[user, day] if name == "ads" else 0
        rows = {
            "instance_id": random.permutation(len(user)) + 1,
            "user_id": (first_user if name == "shop" else 0) + user + 1,
            "item_id": item,
            "request_id": user * NUM_DAYS + day,
            "event_time": time_us,
            "label_buy": random.random(len(user)) < 1 / (1 + np.exp(-logit)),
            "label_time_buy": time_us + 3_600_000_000,
            "event_date": time_us // DAY_US,
            "candidate": candidate,
        }
        write_domain(place, domain(name), rows, token)
    return place


def write_domain(lake: str, spec: Domain, rows: dict[str, Any], token: Any) -> None:
    num = len(rows["user_id"])
    is_real = np.ones(num, bool) if spec.name != "shop" else rows["candidate"] == 0
    rows = rows | {
        "is_sampled": ~is_real,
        "user_bucket": rows["user_id"] % tables.NUM_BUCKETS,
        "user_key": [f"user {u}" for u in rows["user_id"]],
        "item_key": [str(i) for i in rows["item_id"]],
        "request_key": [str(r) for r in rows["request_id"]],
        "f_item": rows["item_id"] + 1,
        "f_store": rows["request_id"] % 7 + 1,
        "as_of": rows["event_time"],
    }
    write(
        lake,
        tables.instances(spec),
        rows | {"f_item": rows["item_key"], "f_store": rows["request_key"]},
    )
    write(lake, tables.ranker_samples(spec), rows)
    events = {name: np.asarray(values)[is_real] for name, values in rows.items()}
    write(lake, tables.histories(spec), events)
    published = {
        "compressor_line": [spec.name] * int(is_real.sum()),
        "available_time": (events["event_time"] // DAY_US + 1) * DAY_US,
        "token": encode(token[is_real]),
    }
    published["compressor_version"] = [f"{spec.name}@{FIRST}"] * int(is_real.sum())
    declare(lake, tables.instance_tokens(spec.name), TokenFormat("float16", WIDTH))
    write(lake, tables.instance_tokens(spec.name), events | published)
    items = {name: published[name][:1] for name in ("compressor_line", "compressor_version")}
    items |= {"item_id": [1], "available_time": published["available_time"][:1]}
    items |= {"decayed_sum": [np.zeros(WIDTH, "<f4").tobytes()], "decayed_count": [1.0]}
    declare(lake, tables.item_tokens(spec.name), TokenFormat("float32", WIDTH))
    write(lake, tables.item_tokens(spec.name), items | {"event_date": events["event_date"][:1]})
    add_line(lake, spec.name, spec.name)


def add_line(lake: str, line: str, domain_name: str, **changes: Any) -> None:
    row = dict.fromkeys(tables.compressor_versions().schema.names, "") | {
        "compressor_line": line, "compressor_version": f"{line}@{FIRST}", "domain": domain_name,
        "order": "user", "protocol": "streaming", "start": FIRST,
        "end": FIRST + timedelta(days=1), "width": WIDTH,
    } | changes  # fmt: skip
    table = tables.compressor_versions()
    rows = pa.Table.from_pylist([row], schema=table.schema)
    delta.replace(lake, table, rows, None, line=line, commit=COMMIT)


def write(lake: str, table: tables.Table, rows: dict[str, Any]) -> None:
    made = []
    for field in table.schema:
        plain = {tables.UTC_TIME: pa.int64(), pa.date32(): pa.int32()}.get(field.type)
        values = rows[field.name]
        found = values if isinstance(values, pa.Array) else pa.array(values)
        made.append(found.cast(plain or field.type).cast(field.type))
    rows_ = pa.Table.from_arrays(made, schema=table.schema)
    rows_ = rows_.sort_by([(name, "ascending") for name in table.sort_by])
    delta.replace(lake, table, rows_, None, commit=COMMIT)
