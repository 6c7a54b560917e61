"""`iat check`: a lake in order passes, and every planted breach is found where it was planted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import write_deltalake

from jobs import check_tables
from jobs.cli import run
from pipelines import delta, tables
from pipelines.days import Days, as_number
from pipelines.domain import parse
from pipelines.errors import CheckFailedError, InputError
from pipelines.tables import Table
from pipelines.token_format import TokenFormat, declare, encode
from tests.compressor.conftest import TINY

FIRST, NUM_DAYS, PER_DAY, WIDTH = date(2026, 1, 1), 10, 240, 8
LOG = Days(FIRST, FIRST + timedelta(days=NUM_DAYS))
LAST = LOG.end - timedelta(days=1)
DAY_US = 86_400_000_000
DOMAIN = parse(TINY)
INSTANCES, TEMPORAL, USER, HISTORIES, SAMPLES, TOKENS, ITEMS = (
    tables.instances(DOMAIN),
    tables.temporal_order(DOMAIN),
    tables.user_order(DOMAIN),
    tables.histories(DOMAIN),
    tables.ranker_samples(DOMAIN),
    tables.instance_tokens(DOMAIN.name),
    tables.item_tokens(DOMAIN.name),
)
Change = Callable[[pa.Table], pa.Table]


def day_rows(day: date) -> pa.Table:
    """A day's rows with the columns of every table: requests of two bought items and one sampled,
    by thirty users; coupons on half of the events."""
    random = np.random.default_rng(as_number(day))
    n = np.arange(PER_DAY)
    request, is_sampled = n // 3, n % 3 == 2
    user = request % 30
    item = random.integers(50, size=PER_DAY)
    moment = pa.array(as_number(day) * DAY_US + request * 60_000_000).cast(tables.UTC_TIME)
    price = pa.array(random.normal(size=PER_DAY), mask=is_sampled | (n % 4 == 0))
    return pa.table(
        {
            "instance_id": as_number(day) * 1000 + n,
            "user_id": user,
            "item_id": item,
            "request_id": as_number(day) * 1000 + request,
            "event_time": moment,
            "as_of": moment,
            "is_sampled": is_sampled,
            "user_bucket": user % tables.NUM_BUCKETS,
            "f_user": user + 1,
            "f_item": item + 1,
            "f_category": item % 5 + 1,
            "f_tags": pa.array([[1 + int(x) % 7, 2] for x in item], pa.list_(pa.int32())),
            "f_stock": random.normal(size=PER_DAY),
            "f_price": price,
            "f_coupon": np.where(n % 2, random.integers(1, 9, PER_DAY), 0),
            "label_buy": (~is_sampled).astype(np.int8),
            "label_time_buy": moment,
            "compressor_line": pa.array(["user"] * PER_DAY),
            "token": encode(random.normal(size=(PER_DAY, WIDTH))),
            "event_date": pa.array([day] * PER_DAY),
        }
    )


def as_declared(table: Table, rows: pa.Table) -> pa.Table:
    """The table's columns; those that a check does not look at are null."""
    held = {
        field.name: rows[field.name].cast(field.type)
        if field.name in rows.column_names and not (table is INSTANCES and field.name[:2] == "f_")
        else pa.nulls(len(rows), field.type)
        for field in table.schema
    }
    return pa.table(held, table.schema)


def item_rows(day: date) -> pa.Table:
    real = day_rows(day)
    item = np.unique(real.filter(pc.invert(real["is_sampled"]))["item_id"].to_numpy())
    return pa.table(
        {
            "item_id": item,
            "compressor_line": pa.array(["user"] * len(item)),
            "decayed_sum": encode(np.ones((len(item), WIDTH)), "float32"),
            "decayed_count": np.ones(len(item), np.float32),
            "event_date": pa.array([day] * len(item)),
        }
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake in order."""
    lake = str(tmp_path_factory.mktemp("whole"))
    rows = pa.concat_tables(map(day_rows, LOG))
    real = rows.filter(pc.invert(rows["is_sampled"]))
    for table in (INSTANCES, TEMPORAL, USER, SAMPLES):
        delta.replace(lake, table, as_declared(table, rows), LOG, commit={})
    delta.replace(lake, HISTORIES, as_declared(HISTORIES, real), LOG, commit={})
    declare(lake, TOKENS, TokenFormat("float16", WIDTH))
    declare(lake, ITEMS, TokenFormat("float32", WIDTH))
    delta.replace(lake, TOKENS, as_declared(TOKENS, real), LOG, line="user", commit={})
    items = as_declared(ITEMS, pa.concat_tables(map(item_rows, LOG)))
    delta.replace(lake, ITEMS, items, LOG, line="user", commit={})
    return lake


@pytest.fixture
def lake(whole: str, tmp_path: Path) -> str:
    """A copy to plant a breach in."""
    return shutil.copytree(whole, tmp_path / "lake").as_posix()


@pytest.fixture(autouse=True)
def _domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_tables, "load_domain", lambda _: DOMAIN)


def plant(lake: str, table: Table, change: Change, day: date = LAST) -> None:
    """Writes a day's rows as `change` makes them, in the order in which it gives them."""
    rows = change(delta.read(lake, table, Days(day, day + timedelta(days=1)))).combine_chunks()
    predicate = f"event_date = '{day}'"
    write_deltalake(delta.uri(lake, table), rows, mode="overwrite", predicate=predicate)


def check(lake: str, **given: Any) -> dict[str, Any]:
    """What is found on the last day, whether that fails or not."""
    args = {"domain": "tiny", "lake": lake, "start": LAST, **given}
    try:
        return check_tables.main(check_tables.Args(**args))
    except CheckFailedError as error:
        return error.result or {}


def told(result: dict[str, Any]) -> list[tuple[str, str, str, int]]:
    return [
        (row["level"], row["table"].split("/")[0], row["rule"], row["count"])
        for row in result["findings"]
    ]


def with_values(name: str, value: Callable[[list[Any]], list[Any]]) -> Change:
    """The rows with a column's values changed."""

    def change(rows: pa.Table) -> pa.Table:
        at = rows.schema.get_field_index(name)
        field = rows.schema.field(at)
        return rows.set_column(at, field, pa.array(value(rows[name].to_pylist()), field.type))

    return change


def test_a_lake_in_order_passes_all_days(
    whole: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    assert run(["check", "--domain", "tiny", "--lake", whole, "--json", str(file)]) == 0
    assert capsys.readouterr().out.endswith("\n0 failed, 0 warnings\n")
    result = json.loads(file.read_text())
    assert result["passed"] is True
    assert len(result["tables"]) == 7


NAN = np.full(WIDTH, np.nan, "<f2").tobytes()
RULES: dict[str, tuple[Table, Change, list[tuple[str, str, str, int]]]] = {
    "a row twice": (
        USER,
        lambda rows: pa.concat_tables([rows.slice(0, 1), rows]),
        [("failed", "user_order", "unique key", 1)],
    ),
    "a row too early in its file": (
        TEMPORAL,
        lambda rows: pa.concat_tables([rows.slice(9, 1), rows.slice(0, 9), rows.slice(10)]),
        [("failed", "temporal_order", "order", 1)],
    ),
    "a user apart": (
        HISTORIES,
        lambda rows: pa.concat_tables([rows.slice(50), rows.slice(0, 50)]),
        [("failed", "histories", "order", 1)],
    ),
    "one stream without a row": (
        TEMPORAL,
        lambda rows: rows.slice(1),
        [("failed", "temporal_order", "same rows", 1)],
    ),
    "a sampled negative in the histories": (
        HISTORIES,
        with_values("instance_id", lambda ids: [*ids[:-1], ids[-1] + 10**6]),
        [("failed", "histories", "same rows", 1)] * 2,
    ),
    "a sample of no instance": (
        SAMPLES,
        lambda rows: pa.concat_tables(
            [rows, with_values("instance_id", lambda ids: [10**9])(rows.slice(len(rows) - 1))]
        ),
        [("failed", "ranker_samples", "same rows", 1)],
    ),
    "a label before its event": (
        INSTANCES,
        with_values("label_time_buy", lambda at: [at[0] - timedelta(microseconds=1), *at[1:]]),
        [("failed", "instances", "label time", 1)],
    ),
    "a label that nobody knows since when": (
        SAMPLES,
        with_values("label_time_buy", lambda at: [None, None, *at[2:]]),
        [("failed", "ranker_samples", "label time", 2)],
    ),
    "a moment of another day": (
        INSTANCES,
        with_values("event_time", lambda at: [at[0] - timedelta(days=1), *at[1:]]),
        [("failed", "instances", "day", 1)],
    ),
    "a feature gone": (
        TEMPORAL,
        with_values("f_price", lambda values: [None] * len(values)),
        [("failed", "temporal_order", "gone missing", 160)],
    ),
    "a feature half gone": (
        TEMPORAL,
        with_values("f_coupon", lambda x: [v if n % 4 == 1 else 0 for n, v in enumerate(x)]),
        [("warning", "temporal_order", "missing share", 120)],
    ),
    "a drifted category": (
        TEMPORAL,
        with_values("f_category", lambda values: [v + 2 for v in values]),
        [("warning", "temporal_order", "drift", 160)],
    ),
    "a drifted list": (
        TEMPORAL,
        with_values("f_tags", lambda values: [[v[0] + 30, v[1] + 30] for v in values]),
        [("warning", "temporal_order", "drift", 160)],
    ),
    "a number in cents": (
        TEMPORAL,
        with_values("f_price", lambda values: [v and v * 100 for v in values]),
        [("warning", "temporal_order", "drift", 160)],
    ),
    "a token that is not finite": (
        TOKENS,
        with_values("token", lambda values: [NAN, *values[1:]]),
        [("failed", "instance_tokens", "finite", 1)],
    ),
    "a token too short": (
        TOKENS,
        with_values("token", lambda values: [values[0][:-2], None, *values[2:]]),
        [("failed", "instance_tokens", "width", 2)],
    ),
    "events without a token": (
        TOKENS,
        lambda rows: rows.slice(3),
        [("failed", "instance_tokens", "coverage", 3)],
    ),
    "longer tokens": (
        TOKENS,
        with_values("token", lambda v: [(np.frombuffer(x, "<f2") * 2).tobytes() for x in v]),
        [("warning", "instance_tokens", "norm", 0)],
    ),
    "an item token that is not finite": (
        ITEMS,
        with_values("decayed_sum", lambda v: [np.full(WIDTH, np.inf, "<f4").tobytes(), *v[1:]]),
        [("failed", "item_tokens", "finite", 1)],
    ),
    "an item without a token": (
        ITEMS,
        lambda rows: rows.slice(1),
        [("failed", "item_tokens", "coverage", 1)],
    ),
}


@pytest.mark.parametrize("breach", RULES)
def test_a_breach_is_found_and_nothing_else(lake: str, breach: str) -> None:
    table, change, wanted = RULES[breach]
    plant(lake, table, change)
    result = check(lake)
    assert told(result) == wanted
    assert {row["day"] for row in result["findings"]} == {LAST}
    assert result["passed"] == all(level == "warning" for level, *_ in wanted)


def test_a_breach_fails_the_command_which_shows_some_rows_and_keeps_the_rest(
    lake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(lake, TOKENS, lambda rows: rows.slice(7))
    first = delta.read(lake, HISTORIES, Days(LAST, LOG.end))["instance_id"].to_pylist()[:7]
    file = tmp_path / "found.json"
    assert run(["check", "--domain", "tiny", "--lake", lake, "--json", str(file)]) == 1
    said = capsys.readouterr()
    (row,) = json.loads(file.read_text())["findings"]
    assert [bad["instance_id"] for bad in row["rows"]] == sorted(first)[:5]
    assert f"failed   instance_tokens/tiny {LAST} user: 7 of 160 events' tokens are" in said.out
    assert f"         instance_id {min(first)}\n" in said.out
    assert f"iat check: check failed: 1 expectations do not hold, the first in {TOKENS.name}" in (
        said.err
    )


def test_drift_fails_past_a_limit(lake: str) -> None:
    plant(lake, TEMPORAL, with_values("f_category", lambda values: [v + 40 for v in values]))
    assert check(lake)["passed"] is True
    result = check(lake, max_drift=0.5)
    assert told(result) == [("failed", "temporal_order", "drift", 160)]
    cells = {row["cell"] for row in result["findings"][0]["rows"]}
    assert cells < {*range(1, 6), *range(41, 46)}


def test_what_changes_every_week_is_no_drift(lake: str) -> None:
    for day in LOG:
        week = (day - FIRST).days // 7
        plant(lake, TEMPORAL, with_values("f_category", lambda x, w=week: [w + 1] * len(x)), day)
    new_week = FIRST + timedelta(days=7)
    assert check(lake, start=new_week, end=new_week + timedelta(days=1))["warnings"] == 1
    # The first new week is news; the next is not, as the days before it hold one change.
    for day in LOG:
        week = (day - FIRST + timedelta(days=6)).days // 7
        plant(lake, TEMPORAL, with_values("f_category", lambda x, w=week: [w + 1] * len(x)), day)
    new_week = FIRST + timedelta(days=8)
    assert check(lake, start=new_week, end=new_week + timedelta(days=1))["warnings"] == 0


def test_a_small_day_says_nothing_of_drift(lake: str) -> None:
    """Ninety events of one user's taste."""
    for table in (INSTANCES, TEMPORAL, USER, SAMPLES, HISTORIES, TOKENS):
        plant(lake, table, lambda rows: rows.filter(pc.less(rows["user_id"], 16)))
    plant(lake, TEMPORAL, with_values("f_category", lambda values: [5] * len(values)))
    result = check(lake)
    assert {(row["table"], row["rule"]) for row in result["findings"]} == {
        (ITEMS.name, "coverage")  # items that nobody took any more
    }


def test_a_line_is_judged_from_its_first_day_to_its_last(lake: str) -> None:
    plant(lake, TOKENS, lambda rows: rows.slice(0, 0))
    plant(lake, ITEMS, lambda rows: rows.slice(0, 0))
    assert check(lake)["findings"] == []  # not written yet
    before = LAST - timedelta(days=1)
    hole = LAST - timedelta(days=2)
    plant(lake, TOKENS, lambda rows: rows.slice(0, 0), hole)
    result = check(lake, start=hole, end=before)
    assert told(result) == [("failed", "instance_tokens", "coverage", 160)]


def test_tokens_of_no_declared_width_are_a_breach(lake: str) -> None:
    rows = delta.read(lake, TOKENS)
    shutil.rmtree(Path(lake, TOKENS.name))
    delta.replace(lake, TOKENS, rows, LOG, line="user", commit={})
    assert told(check(lake)) == [("failed", "instance_tokens", "codec", 1)]


def test_tables_that_are_not_there_yet_are_not_judged(lake: str) -> None:
    for table in (TEMPORAL, HISTORIES, TOKENS, ITEMS):
        shutil.rmtree(Path(lake, table.name))
    assert check(lake)["findings"] == []
    shutil.rmtree(Path(lake, INSTANCES.name))
    with pytest.raises(InputError, match="has no table instances/tiny"):
        check(lake)


def test_a_limit_below_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="--max-drift must be at least 0, got -1"):
        check_tables.Args(domain="tiny", lake="x", max_drift=-1)
