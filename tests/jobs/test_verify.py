"""`iat verify` on a small log in real tables: an honest log passes, each planted fault is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from torch import Tensor

from downstream.token_store import ItemTokens, Tokens, TokenStore
from downstream.user_index import IndexStore
from jobs import verify as job
from jobs.oracle import Oracle
from jobs.verify import check_protocol, check_strays, is_intact, table_text, verify
from jobs.verify_checks import Opener, Reader, open_reader
from pipelines import delta, tables
from pipelines.days import Days
from pipelines.domain import Domain, parse
from pipelines.errors import CheckFailedError, InputError

LINE, WIDTH, DAYS, USERS, ITEMS = "user", 8, 35, 60, 300
FIRST = date(2024, 3, 1)
DAY_US = 86_400_000_000
START_US = (FIRST - date(1970, 1, 1)).days * DAY_US
COMMIT = {"job": "test"}
DECAY = 0.995

DOMAIN = {
    "name": "small",
    "source": {"path": "nowhere.parquet"},
    "columns": {"user": "user", "item": "item", "time": "time"},
    "label": [{"name": "buy", "always": 1}],
    "feature": [
        {"name": "item", "column": "item", "side": "item", "buckets": 4096},
        {"name": "brand", "column": "brand", "side": "item", "buckets": 16},
        {"name": "price", "column": "price", "kind": "number"},
    ],
    "negatives": {"per_positive": 3},
}


def domain(**changes: Any) -> Domain:
    return parse(DOMAIN | changes)


def log(seed: int, pool_days: int = 1) -> list[dict[str, Any]]:
    """Real events and, for each, negatives from its own `pool_days`: 1 is honest, 7 leaks."""
    random = np.random.default_rng(seed)
    weight = 1 / np.arange(1, ITEMS + 1) ** 0.7
    rows: list[dict[str, Any]] = []
    for user in range(USERS):
        for day in np.flatnonzero(random.random(DAYS) < 0.5):
            # Baskets share an instant; some are in the first microsecond of the day.
            at = START_US + int(day) * DAY_US + int(random.integers(0, 5)) * DAY_US // 5
            items = random.choice(ITEMS, random.integers(1, 5), False, weight / weight.sum())
            rows += [{"user": user, "item": int(i), "day": int(day), "us": at} for i in items]
    for number, row in enumerate(rows):
        row |= {"id": number * 7919 % 1_000_003 + 1, "sampled": False}
    period = np.array([row["day"] // pool_days for row in rows])
    taken = {(row["user"], row["day"] // pool_days, row["item"]) for row in rows}
    negatives: list[dict[str, Any]] = []
    for row in rows:
        pool = np.flatnonzero(period == row["day"] // pool_days)
        for place in random.choice(pool, 12):
            item = rows[place]["item"]
            if (row["user"], row["day"] // pool_days, item) not in taken:
                fresh = {"item": item, "sampled": True, "id": 2_000_000 + len(negatives)}
                negatives.append(row | fresh)
    kept = random.choice(len(negatives), min(len(negatives), 3 * len(rows)), False)
    return rows + [negatives[i] for i in sorted(kept)]


def columns(rows: Sequence[dict[str, Any]], domain: Domain) -> dict[str, Any]:
    """Every column that any of the daily tables has, readable features as `r_`."""
    label_us = [row["us"] + 3_600_000_000 * (row["id"] % 30) for row in rows]
    brand = [None if row["item"] % 50 == 0 else f"brand {row['item'] % 23}" for row in rows]
    return {
        "instance_id": [row["id"] for row in rows],
        "user_id": [row["user"] * 1_000_003 + 5 for row in rows],
        "item_id": [row["item"] * 10_007 + 11 for row in rows],
        "request_id": [row["user"] * 100_000 + row["us"] // DAY_US for row in rows],
        "event_time": [moment(row["us"]) for row in rows],
        "as_of": [moment(row["us"]) for row in rows],
        "is_sampled": [row["sampled"] for row in rows],
        "user_key": [f"user {row['user']}" for row in rows],
        "item_key": [f"item {row['item']}" for row in rows],
        "request_key": ["" for _ in rows],
        "user_bucket": [(row["user"] * 1_000_003 + 5) % 16 for row in rows],
        "r_f_item": [f"item {row['item']}" for row in rows],
        "f_item": [row["item"] + 1 for row in rows],
        "r_f_brand": brand,
        "f_brand": [0 if b is None else 1 + int(b[6:]) % 15 for b in brand],
        "f_price": [float(row["item"] % 9) for row in rows],
        "label_buy": [int(not row["sampled"]) if row["id"] % 11 else None for row in rows],
        "label_time_buy": [moment(us) for us in label_us],
        "event_date": [FIRST + timedelta(days=row["day"]) for row in rows],
    }


def moment(us: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(us))


def write_lake(
    lake: Path, domain: Domain, *, seed: int = 0, pool_days: int = 1, token_delay_us: int = 0,
    items_early_us: int = 0, protocol: str = "streaming", version_end: date = FIRST,
) -> None:  # fmt: skip
    """All tables that verify reads, as the jobs would have written them."""
    rows = log(seed, pool_days)
    real = [row for row in rows if not row["sampled"]]
    readable = {"f_item": "r_f_item", "f_brand": "r_f_brand"}
    put(lake, tables.instances(domain), columns(rows, domain), readable)
    put(lake, tables.ranker_samples(domain), columns(rows, domain))
    put(lake, tables.histories(domain), columns(real, domain))
    random = np.random.default_rng(seed + 1)
    # Some events have no token, as after a job that wrote only some days.
    held = [row for row in real if row["id"] % 13]
    vectors = random.normal(0, 1, (len(held), WIDTH)).astype("<f2")
    version = f"{LINE}@{version_end}" if protocol == "frozen" else ""
    tokens = columns(held, domain) | {
        "compressor_line": [LINE] * len(held),
        "compressor_version": [
            version or f"{LINE}@{FIRST + timedelta(days=row['day'])}" for row in held
        ],
        "available_time": [available(row["day"], token_delay_us) for row in held],
        "token": [bytes(vector) for vector in vectors],
    }
    put(lake, tables.instance_tokens(domain.name), tokens)
    items = item_rows(held, vectors.astype(np.float64))
    of_items = {
        "item_id": [item * 10_007 + 11 for item, _, _, _ in items],
        "compressor_line": [LINE] * len(items),
        "compressor_version": ["any"] * len(items),
        "available_time": [
            available(day, token_delay_us - items_early_us) for _, day, _, _ in items
        ],
        "decayed_sum": [bytes(total.astype("<f4")) for _, _, total, _ in items],
        "decayed_count": [count for _, _, _, count in items],
        "event_date": [FIRST + timedelta(days=day) for _, day, _, _ in items],
    }
    put(lake, tables.item_tokens(domain.name), of_items)
    row = dict.fromkeys(tables.compressor_versions().schema.names)
    row |= {
        "compressor_line": LINE, "compressor_version": version or f"{LINE}@{FIRST}",
        "domain": domain.name, "protocol": protocol, "start": FIRST - timedelta(days=9),
        "end": version_end, "width": WIDTH,
    }  # fmt: skip
    put(lake, tables.compressor_versions(), {name: [value] for name, value in row.items()})


def item_rows(held: list[dict[str, Any]], vectors: Any) -> list[tuple[int, int, Any, float]]:
    """(item, day, decayed sum, decayed count) on each day the item occurred, that day included."""
    state: dict[int, tuple[int, Any, float]] = {}
    found = {}
    for place in sorted(range(len(held)), key=lambda i: held[i]["day"]):
        item, day = held[place]["item"], held[place]["day"]
        then, total, count = state.get(item, (day, np.zeros(WIDTH), 0.0))
        lost = DECAY ** (day - then)
        state[item] = (day, total * lost + vectors[place], count * lost + 1)
        found[item, day] = (item, day, *state[item][1:])
    return list(found.values())


def available(day: int, delay_us: int) -> datetime:
    return moment(START_US + (day + 1) * DAY_US + delay_us)


def put(
    lake: Path, table: tables.Table, values: dict[str, Any], renamed: dict[str, str] | None = None
) -> None:
    names = renamed or {}
    made = {n: values[names.get(n, n)] for n in table.schema.names}
    rows = pa.table(
        {n: pa.array(v, table.schema.field(n).type) for n, v in made.items()}, schema=table.schema
    )
    delta.replace(str(lake), table, rows, None, commit=COMMIT)


class Shifted:
    """A store that answers for a moment `shift_us` later: 1 is `<=` in place of `<`."""

    def __init__(self, store: TokenStore, shift_us: int) -> None:
        self.store, self.shift_us = store, shift_us
        self.width = store.width

    def fetch(self, user_ids: Tensor, as_of_us: Tensor, length: int) -> Tokens:
        found = self.store.fetch(user_ids, as_of_us + self.shift_us, length)
        gap_s = found.gap_s_BL - self.shift_us / 1e6
        return found._replace(gap_s_BL=gap_s)

    def fetch_items(self, item_ids: Tensor, as_of_us: Tensor) -> ItemTokens:
        return self.store.fetch_items(item_ids, as_of_us)


def planted(domain: Domain, change: Callable[[Reader], Reader]) -> Opener:
    honest = open_reader(domain, LINE)
    return lambda lake, folder: change(honest(lake, folder))


def failed(report: dict[str, Any]) -> set[str]:
    return {each["name"] for each in report["checks"] if each["passed"] is False}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Domain, str]:
    lake = tmp_path_factory.mktemp("honest")
    write_lake(lake, domain())
    return domain(), str(lake)


def test_an_honest_log_passes_every_check(honest: tuple[Domain, str]) -> None:
    spec, lake = honest
    report = verify(spec, lake, LINE, num_samples=120, length=32)
    assert failed(report) == set(), table_text(report)
    assert all(each["passed"] for each in report["checks"])
    rows = {each["name"]: each["rows"] for each in report["checks"]}
    assert rows["history events and order"] == rows["match features"] == 120
    assert rows["as-of recency of negatives"] > 5_000


def test_late_publishing_short_histories_and_no_negatives_pass_too(tmp_path: Path) -> None:
    spec = domain(tokens={"delay": "30h"}, negatives={"per_positive": 1})
    write_lake(tmp_path, spec, token_delay_us=30 * 3_600_000_000, seed=3)
    report = verify(replace(spec, negatives=None), str(tmp_path), LINE, num_samples=40, length=3)
    assert failed(report) == set(), table_text(report)
    assert [each["passed"] for each in report["checks"]].count(None) == 3


def test_a_store_that_reads_the_same_instant_is_caught(honest: tuple[Domain, str]) -> None:
    spec, lake = honest
    opener = planted(spec, lambda reader: replace(reader, store=Shifted(reader.store, 1)))
    report = verify(spec, lake, LINE, num_samples=40, length=32, opener=opener)
    found = failed(report)
    assert {"history events and order", "disturbed future moves nothing"} <= found
    assert not found & {"match features", "item tokens as of the day"}
    (events,) = [e for e in report["checks"] if e["name"] == "history events and order"]
    # A real row then reads at least itself; so does a negative, its positive's event.
    assert events["differences"] == 40
    assert events["failing"][0]["events_back"] == 1


def test_match_features_of_the_same_instant_are_caught(
    honest: tuple[Domain, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, lake = honest

    def shifted(reader: Reader) -> Reader:
        features = reader.match.features
        monkeypatch.setattr(
            reader.match, "features", lambda u, t, i, side: features(u, t + 1, i, side)
        )
        return reader

    opener = planted(spec, shifted)
    report = verify(spec, lake, LINE, num_samples=40, length=32, opener=opener)
    assert failed(report) == {"match features", "disturbed future moves nothing"}


def test_a_label_read_before_it_was_known_is_caught(honest: tuple[Domain, str]) -> None:
    spec, lake = honest

    def impatient(reader: Reader) -> Reader:
        assert isinstance(reader.store, IndexStore)
        reader.store.columns["label_time_us_buy"].zero_()
        return reader

    opener = planted(spec, impatient)
    report = verify(spec, lake, LINE, num_samples=40, length=32, opener=opener)
    assert failed(report) == {"history label_buy as known", "disturbed future moves nothing"}


def test_an_item_token_of_today_is_caught(tmp_path: Path) -> None:
    write_lake(tmp_path, domain(), items_early_us=DAY_US)
    report = verify(domain(), str(tmp_path), LINE, num_samples=60, length=32)
    assert failed(report) == {
        "item tokens as of the day",
        "disturbed future moves nothing",
        "tokens published as the policy says",
    }
    (items,) = [e for e in report["checks"] if e["name"] == "item tokens as of the day"]
    assert items["differences"] > 30


def test_negatives_of_the_same_week_are_caught(tmp_path: Path) -> None:
    write_lake(tmp_path, domain(), pool_days=7)
    report = verify(domain(), str(tmp_path), LINE, num_samples=20, length=32)
    assert failed(report) == {"as-of recency of negatives"}, table_text(report)


def test_a_history_beside_the_wrong_value_is_caught(
    honest: tuple[Domain, str], tmp_path: Path
) -> None:
    spec, lake = honest
    shutil.copytree(lake, tmp_path / "lake")
    table = tables.histories(spec)
    rows = delta.read(str(tmp_path / "lake"), table)
    place = rows.schema.get_field_index("f_brand")
    rolled = np.roll(rows.column("f_brand").to_numpy(), 1)
    delta.replace(
        str(tmp_path / "lake"), table, rows.set_column(place, "f_brand", pa.array(rolled)), None,
        commit=COMMIT,
    )  # fmt: skip
    report = verify(spec, str(tmp_path / "lake"), LINE, num_samples=40, length=32)
    assert "side information is its hashed value" in failed(report)


def test_tokens_of_later_weights_or_of_sampled_rows_are_caught(
    honest: tuple[Domain, str], tmp_path: Path
) -> None:
    spec, lake = honest
    shutil.copytree(lake, tmp_path / "lake")
    table = tables.instance_tokens(spec.name)
    rows = delta.read(str(tmp_path / "lake"), table).to_pylist()
    rows[0]["compressor_version"] = f"{LINE}@{FIRST + timedelta(days=DAYS)}"
    rows[1]["instance_id"] = 2_000_000  # a sampled negative's
    changed = pa.Table.from_pylist(rows, table.schema)
    delta.replace(str(tmp_path / "lake"), table, changed, None, commit=COMMIT)
    oracle = Oracle(str(tmp_path / "lake"), spec, LINE)
    assert check_strays(oracle).differences == 1
    protocol = check_protocol(oracle, None)
    assert protocol.passed is False
    assert "wrote tokens of 2024-03-01" in protocol.failing[0]["why"]


@pytest.mark.parametrize(("end", "is_neutral"), [(FIRST, True), (FIRST + timedelta(days=1), False)])
def test_a_frozen_compressor_must_end_before_the_rankers_first_day(
    tmp_path: Path, end: date, is_neutral: bool
) -> None:
    write_lake(tmp_path, domain(), protocol="frozen", version_end=end)
    oracle = Oracle(str(tmp_path), domain(), LINE)
    assert check_protocol(oracle, None).passed is is_neutral
    later = Days(FIRST + timedelta(days=1), FIRST + timedelta(days=9))
    assert check_protocol(oracle, later).passed is True


def test_a_line_of_another_protocol_is_not_neutral(tmp_path: Path) -> None:
    write_lake(tmp_path, domain(), protocol="in-sample")
    found = check_protocol(Oracle(str(tmp_path), domain(), LINE), None)
    assert found.passed is False
    assert "in-sample, needed streaming or frozen" in found.failing[0]["why"]


def test_a_changed_report_no_longer_bears_its_signature(honest: tuple[Domain, str]) -> None:
    spec, lake = honest
    report = verify(spec, lake, LINE, num_samples=5, length=8)
    held = json.loads(json.dumps(report))
    assert is_intact(held)
    held["tables"]["instances/small"] += 1
    assert not is_intact(held)
    assert not is_intact({})


def test_the_same_seed_signs_the_same_report(honest: tuple[Domain, str]) -> None:
    spec, lake = honest
    one, two = (verify(spec, lake, LINE, num_samples=5, length=8, seed=4) for _ in range(2))
    assert one == two
    assert one["signature"] != verify(spec, lake, LINE, num_samples=5, length=8)["signature"]


@pytest.fixture
def on_file(honest: tuple[Domain, str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(job, "load", lambda _: honest[0])
    return honest[1]


def test_the_command_prints_a_table_and_writes_the_report(
    on_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = job.Args(
        domain="small", lake=on_file, line=LINE, samples=10, length=8, report=tmp_path / "v.json"
    )
    assert job.main(args)["passed"]
    printed = capsys.readouterr().out
    assert "history events and order" in printed
    assert is_intact(json.loads((tmp_path / "v.json").read_text()))


def test_the_command_fails_with_the_first_failing_rows(
    on_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaky(spec: Domain, line: str) -> Opener:
        return planted(spec, lambda reader: replace(reader, store=Shifted(reader.store, 1)))

    monkeypatch.setattr(job, "open_reader", leaky)
    args = job.Args(
        domain="small", lake=on_file, line=LINE, samples=10, length=8, report=tmp_path / "v.json"
    )
    wanted = r"history events and order: 10 of 10 differ\n  {"
    with pytest.raises(CheckFailedError, match=wanted) as caught:
        job.main(args)
    assert caught.value.result == json.loads((tmp_path / "v.json").read_text())
    assert not json.loads((tmp_path / "v.json").read_text())["passed"]


def test_days_without_ranker_rows_and_senseless_flags_are_refused(
    honest: tuple[Domain, str],
) -> None:
    spec, lake = honest
    with pytest.raises(InputError, match="no rows to verify"):
        verify(spec, lake, LINE, days=Days(date(2020, 1, 1), date(2020, 2, 1)))
    with pytest.raises(InputError, match="--samples must be at least 1"):
        job.Args(domain="small", lake=lake, line=LINE, samples=0)
