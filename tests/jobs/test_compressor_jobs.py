"""`iat train-compressor` and `iat write-tokens` over a small log in real tables."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from compressor import item_state, versions
from compressor.export import TokenWriter
from compressor.item_tokens import ItemState
from jobs import lineage, train_compressor, write_tokens
from pipelines import delta, tables
from pipelines.days import Days
from pipelines.domain import Domain, parse
from pipelines.errors import InputError
from pipelines.token_format import TokenFormat, declare
from tests.compressor.conftest import TINY, small_config

FIRST, NUM_DAYS, NUM_USERS = date(2024, 3, 1), 8, 12
EMPTY = FIRST + timedelta(days=3)
"""A day without an event."""
DELAY = timedelta(hours=2)
START_US = (FIRST - date(1970, 1, 1)).days * 86_400_000_000


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small weights, a small domain, and a version every two days."""
    monkeypatch.setattr(
        train_compressor, "SourceConfig", lambda order: small_config(order=order, context=8)
    )
    monkeypatch.setattr(train_compressor, "FLUSH_DAYS", 2)
    monkeypatch.setattr(write_tokens, "FLUSH_DAYS", 2)
    for job in (train_compressor, write_tokens):
        monkeypatch.setattr(job, "load_domain", lambda name: domain(name))
    return


def domain(name: str = "tiny") -> Domain:
    return parse(TINY | {"name": name, "tokens": {"delay": "2h"}})


def log_rows(spec: Domain, *, last_categories: int = 16) -> pa.Table:
    """Each user buys two items on most days, two sampled ones beside them; from the sixth day on
    coupons may be of a value never seen before."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for user in range(1, NUM_USERS + 1):
        for day in range(NUM_DAYS):
            if day == (EMPTY - FIRST).days or random.random() < 0.3:
                continue
            now = START_US + day * 86_400_000_000 + int(random.integers(86_400)) * 1_000_000
            for candidate in range(4):
                item = int(random.integers(20))
                most = 4 if day < 5 else last_categories
                is_sampled = candidate >= 2
                rows.append(
                    {
                        "instance_id": len(rows) * 7919 + 1, "user_id": user * 1_000_003,
                        "item_id": item, "request_id": user * 1000 + day,
                        "event_time": now, "is_sampled": is_sampled,
                        "f_user": user, "f_item": item + 1, "f_category": item % 5 + 1,
                        "f_tags": random.integers(1, 64, random.integers(0, 4)).tolist(),
                        "f_stock": float(random.normal()),
                        "f_price": None if is_sampled else float(random.normal()),
                        "f_coupon": 0 if is_sampled else int(random.integers(1, most)),
                        "label_buy": int(not is_sampled), "label_time_buy": now,
                        "event_date": FIRST + timedelta(days=day),
                        "user_bucket": user * 1_000_003 % tables.NUM_BUCKETS,
                    }
                )  # fmt: skip
    schema = tables.user_order(spec).schema
    made = {}
    for name in schema.names:
        values = pa.array([row[name] for row in rows])
        is_time = pa.types.is_timestamp(schema.field(name).type)
        made[name] = (values.cast(pa.int64()) if is_time else values).cast(schema.field(name).type)
    return pa.table(made, schema=schema)


def make_lake(place: Path, spec: Domain | None = None) -> str:
    spec = spec or domain()
    rows = log_rows(spec)
    for table in (tables.user_order(spec), tables.temporal_order(spec)):
        wanted = rows.select(table.schema.names)
        delta.replace(str(place), table, wanted, None, commit={"job": "test"})
    return str(place)


@pytest.fixture
def lake(tmp_path: Path) -> str:
    return make_lake(tmp_path / "lake")


def args(lake: str, **given: Any) -> train_compressor.Args:
    return train_compressor.Args(
        domain=given.pop("domain", "tiny"), lake=lake, device="cpu", **given
    )


def tokens_of(lake: str, line: str, days: Days | None = None) -> pa.Table:
    """The line's tokens, without the version, which is named after the line."""
    rows = delta.read(lake, tables.instance_tokens("tiny"), days, line=line)
    return rows.drop_columns(["compressor_line", "compressor_version"])


def items_of(lake: str, line: str) -> pa.Table:
    rows = delta.read(lake, tables.item_tokens("tiny"), line=line)
    return rows.drop_columns(["compressor_line", "compressor_version"])


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


@pytest.mark.parametrize("order", ["temporal", "user"])
def test_every_event_gets_one_token_available_by_policy(lake: str, order: Any) -> None:
    result = train_compressor.main(args(lake, order=order))
    rows = delta.read(lake, tables.instance_tokens("tiny"), line=order)
    stream = delta.read(lake, tables.user_order(domain()))
    events = stream.filter(pc.invert(stream["is_sampled"]))
    assert sorted(rows["instance_id"].to_pylist()) == sorted(events["instance_id"].to_pylist())
    assert result["tokens"] == len(rows)
    assert result["version"] == f"{order}@{day(NUM_DAYS - 1)}"
    for row in rows.to_pylist():
        midnight = datetime(*row["event_date"].timetuple()[:3], tzinfo=UTC) + timedelta(days=1)
        assert row["available_time"] == midnight + DELAY
        assert row["compressor_version"] == f"{order}@{row['event_date']}"
        assert len(row["token"]) == 2 * 16
    assert EMPTY not in set(rows["event_date"].to_pylist())


def test_a_second_run_of_the_same_command_writes_nothing(lake: str) -> None:
    first = train_compressor.main(args(lake))
    table = tables.instance_tokens("tiny")
    version, rows = delta.open_table(lake, table).version(), tokens_of(lake, "user")
    again = train_compressor.main(args(lake))
    assert delta.open_table(lake, table).version() == version
    assert tokens_of(lake, "user").equals(rows)
    assert again["version"] == first["version"]
    assert again["source_auc"] == first["source_auc"]


@pytest.mark.parametrize("moment", ["before the tokens", "between tokens and version"])
def test_a_killed_run_goes_on_and_ends_where_an_undisturbed_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    quiet, cut = (make_lake(tmp_path / name) for name in ("quiet", "cut"))
    train_compressor.main(args(quiet))
    flush, save = TokenWriter.flush, versions.save

    def killed_flush(writer: TokenWriter, days: Days, **more: Any) -> None:
        if days.start == day(4):
            raise KeyboardInterrupt
        flush(writer, days, **more)

    def killed_save(where: str, version: versions.Version, *more: Any) -> Path:
        if version.end == day(6):
            raise KeyboardInterrupt
        return save(where, version, *more)

    with monkeypatch.context() as patched:
        if moment == "before the tokens":
            patched.setattr(TokenWriter, "flush", killed_flush)
        else:
            patched.setattr(versions, "save", killed_save)
        with pytest.raises(KeyboardInterrupt):
            train_compressor.main(args(cut))
    walked: list[date] = []
    days_of_walk = train_compressor.days_of_walk

    def seen(trainer: Any, data: Any, days: Days, **more: Any) -> Any:
        walked.extend(days)
        return days_of_walk(trainer, data, days, **more)

    monkeypatch.setattr(train_compressor, "days_of_walk", seen)
    train_compressor.main(args(cut))
    assert walked == [day(n) for n in range(4, NUM_DAYS)]
    assert tokens_of(cut, "user").equals(tokens_of(quiet, "user"))
    assert items_of(cut, "user").equals(items_of(quiet, "user"))


@pytest.mark.parametrize("killed_at", [2, 4, 6, None])
def test_a_scheduled_run_may_be_repeated_whether_it_was_killed_or_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int | None
) -> None:
    quiet, cut = (make_lake(tmp_path / name) for name in ("quiet", "cut"))
    scheduled: dict[str, Any] = {"parent": "user", "start": day(2), "end": day(NUM_DAYS)}
    for each in (quiet, cut):
        train_compressor.main(args(each, end=day(2)))
    train_compressor.main(args(quiet, **scheduled))
    flush = TokenWriter.flush

    def killed_flush(writer: TokenWriter, days: Days, **more: Any) -> None:
        if killed_at is not None and days.start == day(killed_at):
            raise KeyboardInterrupt
        flush(writer, days, **more)

    with monkeypatch.context() as patched:
        patched.setattr(TokenWriter, "flush", killed_flush)
        with contextlib.suppress(KeyboardInterrupt):
            train_compressor.main(args(cut, **scheduled))
    result = train_compressor.main(args(cut, **scheduled))
    assert result["version"] == f"user@{day(NUM_DAYS - 1)}"
    assert tokens_of(cut, "user").equals(tokens_of(quiet, "user"))
    assert items_of(cut, "user").equals(items_of(quiet, "user"))
    table = tables.instance_tokens("tiny")
    version = delta.open_table(cut, table).version()
    assert version == delta.open_table(quiet, table).version()
    assert train_compressor.main(args(cut, **scheduled))["version"] == result["version"]
    with pytest.raises(InputError, match=f"goes on with --start {day(NUM_DAYS)}, not {day(2)}"):
        train_compressor.main(args(cut, **scheduled, user_share=0.5))
    assert delta.open_table(cut, table).version() == version


def rewrite_stream(lake: str, number: int) -> None:
    """A day of the user-order stream is written again, with the rows that it has."""
    stream, of_day = tables.user_order(domain()), Days(day(number), day(number + 1))
    delta.replace(lake, stream, delta.read(lake, stream, of_day), of_day, commit={"job": "test"})


def test_a_day_of_a_line_that_has_come_further_may_be_repeated_as_long_as_it_is_the_same(
    lake: str,
) -> None:
    train_compressor.main(args(lake, end=day(2)))
    days: list[dict[str, Any]] = [
        {"parent": "user", "start": day(n), "end": day(n + 1)} for n in range(2, 5)
    ]
    done = [train_compressor.main(args(lake, **given)) for given in days]
    before, table = tokens_of(lake, "user"), tables.instance_tokens("tiny")
    version = delta.open_table(lake, table).version()
    rewrite_stream(lake, 6)
    again = [train_compressor.main(args(lake, **given)) for given in days]
    assert [each["version"] for each in again] == [each["version"] for each in done]
    rewrite_stream(lake, 3)  # read by the last two
    assert train_compressor.main(args(lake, **days[0]))["version"] == done[0]["version"]
    for given in days[1:]:
        with pytest.raises(InputError, match=f"goes on with --start {day(5)}"):
            train_compressor.main(args(lake, **given))
    assert delta.open_table(lake, table).version() == version
    assert tokens_of(lake, "user").equals(before)


def test_a_killed_run_goes_on_though_another_day_of_the_stream_was_written_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet, cut = (make_lake(tmp_path / name) for name in ("quiet", "cut"))
    train_compressor.main(args(quiet, end=day(6)))
    flush = TokenWriter.flush

    def killed_flush(writer: TokenWriter, days: Days, **more: Any) -> None:
        if days.start == day(4):
            raise KeyboardInterrupt
        flush(writer, days, **more)

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(TokenWriter, "flush", killed_flush)
        train_compressor.main(args(cut, end=day(6)))
    rewrite_stream(cut, 7)
    assert max(v.end for v in versions.within(cut, "user", Days(day(0), day(6)))) == day(4)
    train_compressor.main(args(cut, end=day(6)))
    assert tokens_of(cut, "user").equals(tokens_of(quiet, "user"))
    table = tables.instance_tokens("tiny")
    opened = [delta.open_table(each, table).version() for each in (cut, quiet)]
    assert opened[0] == opened[1]  # no day was written twice


def test_another_seed_does_not_go_on_from_what_this_one_left(lake: str) -> None:
    train_compressor.main(args(lake, end=day(4)))
    train_compressor.main(args(lake, seed=1, line="other", end=day(4)))
    before = tokens_of(lake, "user")
    train_compressor.main(args(lake, seed=1, end=day(4)))
    assert not tokens_of(lake, "user").equals(before)
    assert tokens_of(lake, "user").equals(tokens_of(lake, "other"))


def test_a_line_continued_from_its_parent_equals_one_walk_over_all_days(tmp_path: Path) -> None:
    whole, daily = (make_lake(tmp_path / name) for name in ("whole", "daily"))
    train_compressor.main(args(whole))
    train_compressor.main(args(daily, end=day(2)))
    for number in (2, 4, 5, 6, 7):
        end = day(4 if number == 2 else number + 1)
        result = train_compressor.main(args(daily, parent="user", end=end))
        assert result["version"] == f"user@{end - timedelta(days=1)}"
    # Rows of the vocabulary stand elsewhere, so sums may be taken in another order.
    ours, theirs = tokens_of(daily, "user"), tokens_of(whole, "user")
    assert ours.drop_columns("token").equals(theirs.drop_columns("token"))
    np.testing.assert_allclose(values(ours), values(theirs), atol=2e-3)
    lineage = {
        row["compressor_version"]: row["parent_version"]
        for row in delta.read(daily, tables.compressor_versions()).to_pylist()
    }
    assert lineage[f"user@{day(7)}"] == f"user@{day(6)}"
    assert lineage[f"user@{day(1)}"] == ""


@pytest.mark.parametrize("window", [1, 3])
def test_a_windowed_line_reads_its_window_alone_and_equals_one_walk_over_all_days(
    tmp_path: Path, window: int
) -> None:
    whole, daily = (make_lake(tmp_path / name) for name in ("whole", "daily"))
    train_compressor.main(args(whole, window=window))
    for number in range(NUM_DAYS):
        parent = {"parent": "user"} if number else {"window": window}
        with unreadable(daily, until=day(number - window)):
            result = train_compressor.main(args(daily, **parent, end=day(number + 1)))
        assert result["rows"] < 4 * NUM_USERS * (window + 1)
    ours, theirs = tokens_of(daily, "user"), tokens_of(whole, "user")
    assert ours.drop_columns("token").equals(theirs.drop_columns("token"))
    np.testing.assert_allclose(values(ours), values(theirs), atol=2e-3)
    unlimited = make_lake(tmp_path / "unlimited")
    train_compressor.main(args(unlimited))
    assert np.abs(values(tokens_of(unlimited, "user")) - values(theirs)).max() > 0.01


@contextlib.contextmanager
def unreadable(lake: str, *, until: date) -> Iterator[None]:
    """Every file of days before `until`, of the stream and of all that was written, is no Parquet
    meanwhile."""
    held = {}
    for path in Path(lake).rglob("event_date=*/*.parquet"):
        if date.fromisoformat(path.parent.name.removeprefix("event_date=")) < until:
            held[path] = path.read_bytes()
            path.write_bytes(b"x" * len(held[path]))
    yield
    for path, content in held.items():
        path.write_bytes(content)


def test_item_tokens_go_on_from_what_was_kept_only_while_the_table_is_as_it_was_left(
    lake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_compressor.main(args(lake, end=day(4)))
    train_compressor.main(args(lake, order="temporal", end=day(6)))  # another line's commits
    table = tables.item_tokens("tiny")

    def read(line: str, start: date) -> tuple[ItemState, bool]:
        """The state, and whether the table's rows were read for it."""
        seen = []
        before = ItemState.before
        with monkeypatch.context() as patched:
            patched.setattr(ItemState, "before", lambda *a: seen.append(a) or before(*a))
            return item_state.before(lake, "tiny", line, start, 16), bool(seen)

    def is_right(state: ItemState, line: str, start: date) -> bool:
        wanted = ItemState.before(lake, "tiny", line, start, 16)
        return all(np.array_equal(vars(state)[n], x) for n, x in vars(wanted).items())

    for line, start, is_read in (
        ("user", day(4), False), ("user", day(3), True), ("temporal", day(6), False),
        ("temporal", day(4), True), ("none", day(4), True),
    ):  # fmt: skip
        state, was_read = read(line, start)
        assert was_read == is_read
        assert is_right(state, line, start)
    one_less = delta.read(lake, table, Days(day(2), day(3)), line="user").slice(1)
    for seed, commit in enumerate(({"job": "test", "line": "again"}, {"job": "test"})):
        train_compressor.main(args(lake, line="again", end=day(4), seed=seed))
        assert not read("again", day(4))[1]
        delta.replace(
            lake, table, one_less, Days(day(2), day(3)), line="user",
            commit=commit,
        )  # fmt: skip
        state, was_read = read("again", day(4))
        assert was_read
        assert is_right(state, "again", day(4))
    item_state.drop(lake, "temporal")
    assert read("temporal", day(6))[1]


def values(rows: pa.Table) -> Any:
    return np.stack([np.frombuffer(t, np.float16) for t in rows["token"].to_pylist()]).astype(float)


def test_a_parent_goes_on_where_it_ended_in_its_own_order_and_protocol(lake: str) -> None:
    train_compressor.main(args(lake, order="temporal", end=day(2)))
    with pytest.raises(InputError, match=f"goes on with --start {day(2)}, not {day(5)}"):
        train_compressor.main(args(lake, parent="temporal", start=day(5)))
    result = train_compressor.main(args(lake, parent="temporal", end=day(4)))
    assert result["version"] == f"temporal@{day(3)}"
    with pytest.raises(InputError, match="a frozen line is a line of one version"):
        train_compressor.main(args(lake, parent="temporal", protocol="frozen"))


def test_frozen_weights_write_any_days_twice_the_same(lake: str) -> None:
    result = train_compressor.main(
        args(lake, protocol="frozen", line="frozen", end=day(4), epochs=2)
    )
    assert result["version"] == f"frozen@{day(4)}"
    assert result["tokens"] == 0
    job = write_tokens.Args(domain="tiny", lake=lake, version="frozen", device="cpu")
    written = write_tokens.main(job)
    first = tokens_of(lake, "frozen")
    assert len(first) == written["tokens"] > 0
    some = Days(day(4), day(6))
    write_tokens.main(replace(job, start=some.start, end=some.end))
    assert tokens_of(lake, "frozen").equals(first)
    # A value of the last days that training never saw reads as missing, and is no error.
    coupons = delta.read(lake, tables.user_order(domain()), columns=["f_coupon", "event_date"])
    seen = pc.max(coupons.filter(pc.less(coupons["event_date"], day(4)))["f_coupon"]).as_py()
    assert pc.max(coupons["f_coupon"]).as_py() > seen


def test_weights_frozen_before_a_day_depend_on_nothing_of_it(tmp_path: Path) -> None:
    lakes = [make_lake(tmp_path / name) for name in ("one", "two")]
    table = tables.user_order(domain())
    later = delta.read(lakes[1], table, Days(day(4), day(NUM_DAYS)))
    place = later.schema.get_field_index("label_buy")
    flipped = pc.subtract(1, later["label_buy"]).cast(later.schema.field(place).type)
    delta.replace(
        lakes[1], table, later.set_column(place, "label_buy", flipped),
        Days(day(4), day(NUM_DAYS)), commit={"job": "test"},
    )  # fmt: skip
    for lake in lakes:
        train_compressor.main(args(lake, protocol="frozen", line="f", end=day(4), epochs=1))
        write_tokens.main(write_tokens.Args(domain="tiny", lake=lake, version="f", device="cpu"))
    assert tokens_of(lakes[0], "f").equals(tokens_of(lakes[1], "f"))


def test_streaming_tokens_depend_on_nothing_of_a_later_day(tmp_path: Path) -> None:
    lakes = [make_lake(tmp_path / name) for name in ("one", "two")]
    table = tables.user_order(domain())
    later = delta.read(lakes[1], table, Days(day(4), day(NUM_DAYS)))
    place = later.schema.get_field_index("f_item")
    changed = pc.add(later["f_item"], 30).cast(later.schema.field(place).type)
    delta.replace(
        lakes[1], table, later.set_column(place, "f_item", changed), Days(day(4), day(NUM_DAYS)),
        commit={"job": "test"},
    )  # fmt: skip
    for lake in lakes:
        train_compressor.main(args(lake))
    early = Days(FIRST, day(4))
    ours, theirs = (values(tokens_of(lake, "user", early)) for lake in lakes)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_an_untrained_line_is_the_initial_weights_and_says_so(lake: str) -> None:
    train_compressor.main(args(lake, untrained=True, line="untrained"))
    (row, *_) = delta.read(lake, tables.compressor_versions(), line="untrained").to_pylist()
    meta = json.loads((Path(row["artifact"]) / "meta.json").read_text())
    assert meta["version"]["is_trained"] is False
    assert meta["num_steps"] == 0


def test_the_run_and_its_versions_are_on_record(lake: str) -> None:
    train_compressor.main(args(lake))
    (report,) = delta.read(lake, tables.job_reports()).to_pylist()
    assert report["job"] == "train-compressor"
    found = json.loads(report["report"])
    assert found["status"] == "done"
    assert found["rows"] == len(delta.read(lake, tables.user_order(domain())))
    rows = delta.read(lake, tables.compressor_versions()).to_pylist()
    newest = max(rows, key=lambda row: row["end"])
    assert newest["end"] == day(NUM_DAYS)
    assert json.loads(newest["input_versions"]) == {"user_order/tiny": 1}
    assert "source_auc" in json.loads(newest["metrics"])


def test_a_day_of_tokens_says_of_which_stream_and_version_it_is(lake: str) -> None:
    train_compressor.main(args(lake))
    (report,) = delta.read(lake, tables.job_reports()).to_pylist()
    asked = lineage.Args(table="instance_tokens/tiny", lake=lake, day=day(2))
    rows = {(r["table"], r["version"]): r for r in lineage.main(asked)["commits"]}
    (root, *_) = rows.values()
    assert (root["job"], root["run"]) == ("train-compressor", report["run"])
    above = [(up["table"], up["version"]) for up in root["made_of"]]
    assert above == [("user_order/tiny", 1), ("compressor_versions", f"user@{day(3)}")]
    assert rows["compressor_versions", f"user@{day(3)}"]["run"] == report["run"]


def test_frozen_tokens_name_the_version_that_wrote_them(lake: str) -> None:
    train_compressor.main(args(lake, protocol="frozen", line="frozen", end=day(4), epochs=1))
    write_tokens.main(write_tokens.Args(domain="tiny", lake=lake, version="frozen", device="cpu"))
    asked = lineage.Args(table="item_tokens/tiny", lake=lake, day=day(6))
    (root, *_) = lineage.main(asked)["commits"]
    assert (root["job"], root["line"]) == ("write-tokens", "frozen")
    assert root["compressor_version"] == f"frozen@{day(4)}"


def test_a_table_of_another_width_is_refused_and_left_as_it_was(lake: str) -> None:
    table = tables.instance_tokens("tiny")
    declare(lake, table, TokenFormat("float16", 32))
    with pytest.raises(InputError, match="use the table's format"):
        train_compressor.main(args(lake))
    assert len(delta.read(lake, table)) == 0
    assert not delta.exists(lake, tables.compressor_versions())


def test_what_is_not_there_is_named(lake: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no table compressor_versions"):
        train_compressor.main(args(lake, parent="user"))
    train_compressor.main(args(lake, end=day(2)))
    with pytest.raises(InputError, match=r"called 'other'; the lake has: user@2024-03-02"):
        write_tokens.main(write_tokens.Args(domain="tiny", lake=lake, version="other"))
    with pytest.raises(InputError, match="write-tokens is for frozen versions"):
        write_tokens.main(write_tokens.Args(domain="tiny", lake=lake, version="user"))
    with pytest.raises(InputError, match=r"user_order/tiny has no rows in \[2030-01-01"):
        train_compressor.main(args(lake, start=date(2030, 1, 1), end=date(2030, 1, 2)))
    with pytest.raises(InputError, match="no table user_order/tiny"):
        train_compressor.main(args(str(tmp_path / "nowhere")))


def test_a_version_of_another_domain_is_refused(lake: str) -> None:
    train_compressor.main(args(lake, end=day(2)))
    make_lake(Path(lake), domain("elsewhere"))
    with pytest.raises(InputError, match=r"line user of .* is of domain tiny"):
        train_compressor.main(args(lake, domain="elsewhere", parent="user"))
    with pytest.raises(InputError, match="compresses domain 'tiny', not 'elsewhere'"):
        train_compressor.main(args(lake, domain="elsewhere", parent="user", line="own"))


def test_a_dry_run_writes_nothing(lake: str) -> None:
    result = train_compressor.main(args(lake, dry_run=True))
    assert result["rows"] > 0
    assert not delta.exists(lake, tables.instance_tokens("tiny"))
    assert not delta.exists(lake, tables.job_reports())


def test_senseless_flags_are_refused(lake: str) -> None:
    with pytest.raises(InputError, match="--user-share must be above 0"):
        args(lake, user_share=0.0)
    with pytest.raises(InputError, match="--device must be cpu, cuda or auto"):
        train_compressor.main(replace(args(lake), device="abacus"))


def test_a_line_of_another_domain_is_never_written_over(lake: str) -> None:
    make_lake(Path(lake), domain("other"))
    train_compressor.main(args(lake, end=day(1)))
    with pytest.raises(InputError, match=r"line user of .* is of domain tiny: give other a line"):
        train_compressor.main(args(lake, domain="other", end=day(1)))
    train_compressor.main(args(lake, domain="other", end=day(1), line="other-user"))
