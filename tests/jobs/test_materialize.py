"""`iat materialize` says of fuzzed logs, bit for bit, what both stores and a plain loop say."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql.functions import lit, raise_error

from downstream.materialized import tokens_of
from downstream.token_store import HistoryRow, InMemoryTokenStore, Tokens, TokenStore
from downstream.user_index import IndexStore, UserIndex
from jobs.cli import run
from jobs.materialize import FILE_BYTES, Args, Source, explained
from jobs.spark_faults import SPARK_ERRORS, as_ours
from pipelines import delta, tables, token_format
from pipelines import materialized as pasts
from pipelines.days import Days, midnight, to_us
from pipelines.domain import load
from pipelines.errors import InputError, RetryableError
from pipelines.token_format import TokenFormat
from tests.downstream.test_user_index import DEVICES, as_table, assert_same

FILE = """
name = "shop"
source = {path = "nowhere"}
columns = {user = "u", item = "i", time = "t"}
label = [{name = "buy", column = "b"}, {name = "like", column = "l", delay = "1h"}]
[[feature]]
name = "item"
column = "i"
side = "item"
buckets = 100000
[[feature]]
name = "brand"
column = "brand"
side = "item"
[[feature]]
name = "price"
column = "price"
kind = "number"
"""
FIRST = date(2026, 3, 1)
DAYS = Days(FIRST, FIRST + timedelta(days=3))
START_US, DAY_US = to_us(midnight(FIRST)), 86_400_000_000
FORM = TokenFormat("float16", 3)
LINE, OTHER_LINE = "main", "other"
LENGTHS = (1, 5)
NUM_USERS = 220

INSTANT = st.builds(
    lambda day, base, off: min(max(day * DAY_US + base + off, 0), 3 * DAY_US - 1),
    st.integers(0, 2), st.sampled_from([0, 40_000_000_000, DAY_US - 1]), st.integers(-1, 1),
)  # fmt: skip
"""Few instants, one microsecond apart at most or hours, so that ties are the rule."""
LABEL = st.tuples(st.sampled_from([None, 0, 1]), st.none() | INSTANT)
HALF = st.floats(-60_000, 60_000, width=16)


@dataclass(frozen=True)
class Event:
    """An event with all that may be said of it, times in us since START_US."""

    at: int
    brand: int
    labels: tuple[tuple[int | None, int | None], ...]
    token: tuple[float, ...] | None
    available: int | None
    """When its token is published, if ever."""
    is_asked: bool
    """It is a ranker sample itself."""


EVENT = st.builds(
    Event,
    at=INSTANT,
    brand=st.integers(0, 3),
    labels=st.tuples(LABEL, LABEL),
    token=st.none() | st.tuples(HALF, HALF, HALF),
    available=st.none() | INSTANT,
    is_asked=st.booleans(),
)


@dataclass
class World:
    """Rows as the tables have them, by column."""

    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    draw: random.Random = field(default_factory=lambda: random.Random(3))

    def add(self, events: list[Event], asked: list[int]) -> None:
        """One user more, whose ids say nothing of the order of time."""
        number = len({row["user_id"] for row in self.events + self.samples})
        user = (-1) ** number * (number * 10**16 + number)
        keys = {"user_id": user, "request_id": 7}
        for event in events:
            instance_id = self.draw.randrange(-(2**62), 2**62)
            row = {
                **keys, "event": event, "instance_id": instance_id, "at": event.at,
                "item_id": len(self.events) + 1,
            }  # fmt: skip
            self.events.append(row)
            if event.is_asked:
                self.samples.append(row | {"is_sampled": False})
        for at in asked:
            instance_id = self.draw.randrange(-(2**62), 2**62)
            self.samples.append(
                keys | {"instance_id": instance_id, "at": at, "item_id": 5, "is_sampled": True}
            )


def fuzzed() -> World:
    """Users of hypothesis' making in one world, for one run of Spark, and one with a long past."""
    world = World()

    @settings(
        max_examples=NUM_USERS, database=None, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(events=st.lists(EVENT, max_size=12), asked=st.lists(INSTANT, max_size=4))
    def add(events: list[Event], asked: list[int]) -> None:
        world.add(events, asked)

    add()
    draw = random.Random(1)
    long = [
        Event(
            at=draw.randrange(3 * DAY_US), brand=draw.randrange(4), is_asked=True,
            labels=((1, draw.randrange(3 * DAY_US)), (None, None)),
            token=(draw.randrange(2048) / 64, 1.0, -0.0), available=draw.randrange(3 * DAY_US),
        )
        for _ in range(400)
    ]  # fmt: skip
    world.add([*long, *(replace(event, brand=1) for event in long[:40])], [0, 3 * DAY_US - 1])
    return world


def columns_of(rows: list[dict[str, Any]], line: str) -> dict[str, list[Any]]:
    """Of every table at once; each takes its own."""
    events = [row.get("event") for row in rows]
    found: dict[str, list[Any]] = {
        name: [row[name] for row in rows]
        for name in ("instance_id", "user_id", "item_id", "request_id")
    }
    times = [START_US + row["at"] for row in rows]
    found |= {
        "event_time": times,
        "as_of": times,
        "event_date": [FIRST + timedelta(days=row["at"] // DAY_US) for row in rows],
        "user_bucket": [row["user_id"] % 4 for row in rows],
        "is_sampled": [row.get("is_sampled", False) for row in rows],
        "f_item": found["item_id"],
        "f_brand": [event.brand if event else 0 for event in events],
        "f_price": [1.0] * len(rows),
        "compressor_line": [line] * len(rows),
        "compressor_version": ["v"] * len(rows),
        "available_time": [_us(event.available) if event else None for event in events],
    }
    for i, name in enumerate(("buy", "like")):
        labels = [event.labels[i] if event else (None, None) for event in events]
        found[f"label_{name}"] = [value for value, _ in labels]
        found[f"label_time_{name}"] = [_us(at) for _, at in labels]
    return found


def _us(at: int | None) -> int | None:
    return None if at is None else START_US + at


def put(lake: str, table: tables.Table, columns: Mapping[str, Any], day: date, **more: Any) -> None:
    commit = {"job": "test", **({"line": more["line"]} if more else {})}
    rows = as_table(dict(columns), table.schema)
    delta.replace(lake, table, rows, Days(day, day + timedelta(days=1)), commit=commit, **more)


def write_day(world: World, lake: str, domain: Any, day: date, *, share: float = 1.0) -> None:
    """A day's tables; a `share` of its events only, as when the others come late."""
    table = tables.instance_tokens("shop")
    events, samples = (
        [row for row in rows if FIRST + timedelta(days=row["at"] // DAY_US) == day]
        for rows in (world.events, world.samples)
    )
    events = events[: int(share * len(events))]
    put(lake, tables.histories(domain), columns_of(events, ""), day)
    put(lake, tables.ranker_samples(domain), columns_of(samples, ""), day)
    token_format.declare(lake, table, FORM)
    held = [row for row in events if row["event"].token is not None]
    for line, factor in ((LINE, 1), (OTHER_LINE, 0.5)):
        values = np.array([row["event"].token for row in held]).reshape(-1, FORM.width) * factor
        put(lake, table, columns_of(held, line) | {"token": token_format.encode(values)}, day,
            line=line)  # fmt: skip
    items = tables.item_tokens("shop")
    if not delta.exists(lake, items):
        delta.replace(lake, items, items.schema.empty_table(), None, commit={"job": "test"})


def iat(command: str, place: Path, *flags: object) -> str:
    """What a command that ends well prints; else its error is raised."""
    words = [command, "--domain", place / "shop.toml", "--lake", place / "lake", *flags]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(word) for word in words])
    if code:
        raise InputError(f"{code}: {err.getvalue()}")
    return out.getvalue()


def materialize(place: Path, length: int, *flags: object, line: str = LINE) -> dict[str, Any]:
    told = place / "told.json"
    words = ["--line", line, "--length", length, "--master", "local[2]", *flags, "--json", told]
    iat("materialize", place, *words)
    found: dict[str, Any] = json.loads(told.read_text())
    return found


@dataclass(frozen=True)
class Shop:
    """A world in a lake whose days came out of order and in parts, materialised at some lengths."""

    world: World
    domain: Any
    place: Path
    index: UserIndex
    """Extended after each write."""

    def at(self, length: int) -> Path:
        return self.place / str(length)

    def read(self, length: int, *, line: str = LINE) -> pa.Table:
        return delta.read(
            str(self.at(length) / "lake"), tables.materialized(self.domain), line=line
        )


@pytest.fixture(scope="module")
def shop(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    place = tmp_path_factory.mktemp("materialize")
    made, lake = place / "made", str(place / "made" / "lake")
    made.mkdir()
    (made / "shop.toml").write_text(FILE)
    domain, world = load(str(made / "shop.toml")), fuzzed()
    first, second, third = DAYS
    # Late: a day before another, half of its events first, and all of a day again.
    for day, share in ((second, 0.5), (third, 1), (first, 1), (second, 1), (third, 1)):
        write_day(world, lake, domain, day, share=share)
        index = UserIndex.extended(
            lake, domain, place / "index", days=None, lines=[LINE, OTHER_LINE]
        )
    for length, file_bytes in zip(LENGTHS, (FILE_BYTES, 20_000), strict=True):
        shutil.copytree(made, place / str(length))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("jobs.materialize.FILE_BYTES", file_bytes)
            materialize(place / str(length), length)
    return Shop(world, domain, place, index)


def asked(rows: pa.Table) -> tuple[torch.Tensor, torch.Tensor]:
    as_of_us = rows["as_of"].cast(pa.int64()).to_numpy()
    return torch.tensor(rows["user_id"].to_numpy()), torch.tensor(as_of_us)


def content(tokens: Tokens) -> dict[str, torch.Tensor]:
    """All but row_BL, which counts the rows of an index; f_item tells events apart."""
    found = tokens._asdict()
    del found["row_BL"]
    return found | found.pop("side")


def plain_loop(world: World, rows: pa.Table, length: int) -> dict[str, torch.Tensor]:
    """What each sample may read, from the world itself, by nothing but the rules of time."""
    num, names = len(rows), ("f_item", "f_brand", "label_buy", "label_like")
    token = np.zeros((num, length, FORM.width), np.float16)
    mask, token_mask = (np.zeros((num, length), bool) for _ in range(2))
    gap_s = np.zeros((num, length), np.float32)
    side = {name: np.zeros((num, length), np.int32) for name in names}
    moments = (np.asarray(asked(rows)[1]) - START_US).tolist()
    for b, (user, now) in enumerate(zip(rows["user_id"].to_pylist(), moments, strict=True)):
        past = [row for row in world.events if row["user_id"] == user and row["at"] < now]
        past.sort(key=lambda row: (row["at"], row["instance_id"]), reverse=True)
        for back, row in enumerate(past[:length]):
            here, event = (b, length - 1 - back), row["event"]
            mask[here], gap_s[here] = True, np.float32(np.float64(now - row["at"]) / 1e6)
            side["f_item"][here], side["f_brand"][here] = row["item_id"], event.brand
            if event.token is not None and event.available is not None and event.available < now:
                token[here], token_mask[here] = np.float16(event.token), True
            for name, (value, known) in zip(names[2:], event.labels, strict=True):
                if value is not None and known is not None and known < now:
                    side[name][here] = 1 + value
    found = {"token_BLD": token, "mask_BL": mask, "token_mask_BL": token_mask, "gap_s_BL": gap_s}
    return {name: torch.from_numpy(array) for name, array in (found | side).items()}


def twin(world: World) -> InMemoryTokenStore:
    def never(at: int | None) -> int:
        return 2**62 if at is None else START_US + at

    rows = [
        HistoryRow(
            user_id=row["user_id"], event_time_us=START_US + row["at"],
            instance_id=row["instance_id"], token=row["event"].token,
            side={"f_item": row["item_id"], "f_brand": row["event"].brand},
            labels={
                name: (value, never(known))
                for name, (value, known) in zip(("buy", "like"), row["event"].labels, strict=True)
            },
            available_us=never(row["event"].available),
        )
        for row in world.events
    ]  # fmt: skip
    return InMemoryTokenStore(
        rows, width=FORM.width, side=["f_item", "f_brand"], labels=["buy", "like"]
    )


def stores(shop: Shop, device: str) -> Iterator[TokenStore]:
    """The index that grew with its tables, and one that is built of them as they are."""
    yield IndexStore(shop.index, LINE, device)
    lake, folder = str(shop.place / "made" / "lake"), shop.place / f"built-{device}"
    yield IndexStore(
        UserIndex.build(lake, shop.domain, folder, days=None, lines=[LINE]), LINE, device
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_spark_says_bit_for_bit_what_a_plain_loop_and_the_twin_say(shop: Shop, length: int) -> None:
    rows = shop.read(length)
    assert sorted(rows["instance_id"].to_pylist()) == sorted(
        row["instance_id"] for row in shop.world.samples
    )
    found = content(tokens_of(rows, shop.domain, FORM, length))
    assert_same(found, plain_loop(shop.world, rows, length))
    assert_same(found, content(twin(shop.world).fetch(*asked(rows), length)))
    # The world has what this is about.
    seen = {name: bool(tensor.any()) for name, tensor in found.items()}
    assert all(seen.values()), seen
    assert not found["mask_BL"].all()
    assert (found["mask_BL"] & ~found["token_mask_BL"]).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", LENGTHS)
def test_spark_says_bit_for_bit_what_the_stores_say(shop: Shop, length: int, device: str) -> None:
    rows = shop.read(length)
    found = content(tokens_of(rows, shop.domain, FORM, length))
    for store in stores(shop, device):
        assert_same(found, content(store.fetch(*asked(rows), length)))


def files_of(lake: str, table: tables.Table) -> dict[str, set[str]]:
    """Names of files by their partition."""
    found: dict[str, set[str]] = {}
    for uri in delta.open_table(lake, table).file_uris():
        path = Path(uri)
        found.setdefault(f"{path.parent.parent.name}/{path.parent.name}", set()).add(path.name)
    return found


def test_a_day_is_replaced_alone_and_lines_lie_side_by_side(shop: Shop, tmp_path: Path) -> None:
    place, length = shutil.copytree(shop.at(LENGTHS[1]), tmp_path / "copy"), LENGTHS[1]
    lake, table = str(place / "lake"), tables.materialized(shop.domain)
    held, files = shop.read(length), files_of(lake, table)
    second = ("--start", FIRST + timedelta(days=1), "--end", FIRST + timedelta(days=2))
    day = Days(FIRST + timedelta(days=1), FIRST + timedelta(days=2))
    told = {line: materialize(place, length, *second, line=line) for line in (LINE, OTHER_LINE)}
    # The same day again is the same table, and no other day's or line's file is touched.
    assert delta.read(lake, table, line=LINE).equals(held)
    after, name = files_of(lake, table), f"event_date={day.start}"
    assert {key for key in {*files, *after} if files.get(key) != after.get(key)} == {
        f"compressor_line={LINE}/{name}", f"compressor_line={OTHER_LINE}/{name}",
    }  # fmt: skip
    other, main = delta.read(lake, table, line=OTHER_LINE), delta.read(lake, table, day, line=LINE)
    assert told[LINE]["rows"] == told[OTHER_LINE]["rows"] == len(main)
    found, of_main = (tokens_of(rows, shop.domain, FORM, length) for rows in (other, main))
    assert torch.equal(found.token_BLD, of_main.token_BLD * 0.5)
    assert torch.equal(found.token_mask_BL, of_main.token_mask_BL)
    # Its commit says of what it was made.
    _, commit = next(delta.commits(delta.open_table(lake, table)))
    assert (commit["job"], commit["line"]) == ("materialize", OTHER_LINE)
    assert json.loads(commit["inputs"]) == told[OTHER_LINE]["input_versions"]
    assert delta.days_told(commit) == day
    said = iat_alone("lineage", table.name, "--lake", lake, "--day", day.start)
    assert all(name in said for name in told[LINE]["input_versions"])


def iat_alone(*words: object) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run([str(word) for word in words]) == 0
    return out.getvalue()


@pytest.mark.parametrize(("length", "files_per_day"), [(LENGTHS[0], 1), (LENGTHS[1], 2)])
def test_each_file_is_sorted_by_user_and_moment(
    shop: Shop, length: int, files_per_day: int
) -> None:
    lake, table = str(shop.at(length) / "lake"), tables.materialized(shop.domain)
    opened, users = delta.open_table(lake, table), Counter[tuple[Any, ...]]()
    for uri in opened.file_uris():
        rows = pq.ParquetFile(uri).read(list(table.sort_by))
        assert rows.equals(rows.sort_by([(name, "ascending") for name in table.sort_by]))
        users.update((Path(uri).parent.name, user) for user in set(rows["user_id"].to_pylist()))
    # A day too wide for one file is several, and nobody's rows of a day are in two.
    assert len(opened.file_uris()) == len(DAYS) * files_per_day
    assert set(users.values()) == {1}
    assert token_format.declared(opened) == FORM
    assert token_format.declared_length(opened) == length
    assert delta.has_properties(lake, table, delta.OF_EVENTS)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--length", 7), r"rows of 5 vectors and this run needs 7: .* Give --length 5, or write"),
        (("--length", 0), "--length must be from 1 to 65536, got 0"),
        (("--line", "third"), "no tokens of line 'third'; lines there: main, other"),
        (("--line", "../x"), "is no compressor line"),
        (("--start", "2027-01-01"), "has no rows in"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    shop: Shop, flags: tuple[object, ...], said: str
) -> None:
    place = shop.at(LENGTHS[1])
    words = {"--line": LINE, "--length": LENGTHS[1], flags[0]: flags[1]}
    with pytest.raises(InputError, match=f"2: .*{said}"):
        iat("materialize", place, *(word for pair in words.items() for word in pair))


def test_a_dry_run_says_how_much_and_writes_nothing(shop: Shop) -> None:
    place = shop.place / "made"
    told = iat("materialize", place, "--line", LINE, "--length", 4, "--dry-run")
    assert told.startswith(f"shop: would write {len(shop.world.samples):,d} samples of {DAYS} with")
    assert not delta.exists(str(place / "lake"), tables.materialized(shop.domain))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (pasts.TWICE, "build the streams of shop again, or write line main again"),
        (pasts.OTHER_FORMAT, "instance_tokens/shop declares float16 x 3 and line main has tokens"),
    ],
)
def test_rows_that_no_index_would_take_are_wrong_input(
    shop: Shop, spark: SparkSession, fault: str, says: str
) -> None:
    place = shop.place / "made"
    args = Args(domain=str(place / "shop.toml"), lake=str(place / "lake"), line=LINE)
    with pytest.raises(SPARK_ERRORS) as raised:
        spark.range(1).select(raise_error(lit(fault))).collect()
    error = as_ours(raised.value, "writing")
    assert isinstance(error, RetryableError)
    found = explained(error, Source.of(args), args)
    assert isinstance(found, InputError)
    assert says in str(found)
    other = RetryableError("a lost race")
    assert explained(other, Source.of(args), args) is other


def states(place: Path) -> dict[str, str]:
    told = place / "status.json"
    days = ("--start", DAYS.start, "--end", DAYS.end)
    iat("status", place, *days, "--json", told)
    found: dict[str, str] = json.loads(told.read_text())["tables"][f"materialized of {LINE}"][
        "again"
    ]
    return found


def test_status_knows_a_day_whose_past_was_written_again(shop: Shop, tmp_path: Path) -> None:
    place = shutil.copytree(shop.at(LENGTHS[0]), tmp_path / "copy")
    first, second, third = map(str, DAYS)
    assert states(place) == {}
    write_day(shop.world, str(place / "lake"), shop.domain, DAYS.end - timedelta(days=1))
    assert list(states(place)) == [third]
    histories = tables.histories(shop.domain)
    day = Days(DAYS.start + timedelta(days=1), DAYS.end - timedelta(days=1))
    rows = delta.read(str(place / "lake"), histories, day)
    delta.replace(str(place / "lake"), histories, rows, day, commit={"job": "test"})
    assert states(place)[second] == "histories/shop rewritten"
    assert first not in states(place)


def test_a_feature_that_came_later_reads_as_missing_in_the_days_before(
    shop: Shop, tmp_path: Path
) -> None:
    place = shutil.copytree(shop.at(LENGTHS[0]), tmp_path / "copy")
    (place / "shop.toml").write_text(
        FILE + '[[feature]]\nname = "shelf"\ncolumn = "shelf"\nside = "item"\n'
    )
    domain, lake = load(str(place / "shop.toml")), str(place / "lake")
    table = tables.materialized(domain)
    delta.evolve(lake, table, commit={"job": "test"})
    rows = delta.read(lake, table)
    found = tokens_of(rows, domain, FORM, LENGTHS[0])
    assert found.side["f_shelf"].shape == (len(rows), LENGTHS[0])
    assert not found.side.pop("f_shelf").any()
    assert_same(content(found), content(tokens_of(rows, shop.domain, FORM, LENGTHS[0])))


def test_lists_of_another_length_than_told_are_refused(shop: Shop) -> None:
    with pytest.raises(InputError, match="token needs lists of 6 entries, got 5"):
        tokens_of(shop.read(LENGTHS[1]), shop.domain, FORM, 6)
