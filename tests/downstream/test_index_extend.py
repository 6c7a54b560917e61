"""An extended index says what one built as a whole says, and whoever has it open is undisturbed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from downstream import index_build, index_extend, index_files
from downstream.data import with_shuffled_tokens
from downstream.index_files import Writer
from downstream.match_features import MatchIndex
from downstream.token_store import HistoryRow
from downstream.user_index import IndexStore, UserIndex
from jobs.forget import rebuilt
from jobs.train_ranker import Args, index_arrays, user_index
from pipelines import delta, tables, token_format
from pipelines.days import Days, midnight, to_us
from pipelines.domain import parse
from pipelines.errors import InputError, RetryableError
from tests.downstream.test_user_index import (
    COMMIT,
    DAY,
    DEVICES,
    DOMAIN,
    RAW,
    as_table,
    asked_of,
    assert_same,
    write_events,
    write_tokens,
)

US_A_DAY = 86_400_000_000
LINE = "main"
NUM_DAYS = 6
WRITTEN = ("events", "tokens", "items")
"""What a step writes of a day; its jobs may be run one by one."""
STEPS = st.lists(
    st.tuples(
        st.lists(st.integers(0, NUM_DAYS - 1), min_size=1, max_size=3, unique=True),
        st.lists(st.sampled_from(WRITTEN), min_size=1, unique=True),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=5,
)
"""Days in any order, written again or for the first time; what of them; and with which content."""


def days_of(number: int) -> Days:
    return Days(DAY + timedelta(days=number), DAY + timedelta(days=number + 1))


def rows_of(number: int, seed: int = 0, num: int = 12) -> list[HistoryRow]:
    """A day's events, and other ones by another seed: some stay, labels change, some are new."""
    draw = np.random.default_rng([number, seed])
    start_us = to_us(midnight(DAY)) + number * US_A_DAY
    return [
        HistoryRow(
            user_id=int(draw.integers(-4, 4)) * 10**17,
            event_time_us=start_us + int(draw.integers(5)) * 1_000_000,
            instance_id=number * 1000 + i * 10 + int(draw.integers(2)),
            item_id=int(draw.integers(4)),
            request_id=number * 100 + i,
            side={"f_brand": int(draw.integers(4))},
            labels={"buy": (int(draw.integers(2)), start_us + int(draw.integers(10**11)))},
            token=[float(x) for x in draw.integers(1, 9, 2)] if draw.random() < 0.8 else None,
            available_us=start_us + US_A_DAY,
        )
        for i in range(num)
        if draw.random() < 0.8
    ]


def write_day(
    lake: str, number: int, seed: int = 0, what: tuple[str, ...] | list[str] = WRITTEN
) -> None:
    rows, days = rows_of(number, seed), days_of(number)
    if "events" in what:
        write_events(lake, rows, days=days)
    if "tokens" in what:
        write_tokens(lake, rows, line=LINE, days=days)
    if "items" in what:
        write_items(lake, number, seed)


def write_items(lake: str, number: int, seed: int = 0, line: str = LINE) -> None:
    rows = rows_of(number, seed)
    items = sorted({row.item_id for row in rows})
    draw = np.random.default_rng([number, seed])
    columns = {
        "item_id": items,
        "compressor_line": [line] * len(items),
        "compressor_version": ["v1"] * len(items),
        "available_time": [to_us(midnight(days_of(number).end))] * len(items),
        "decayed_sum": token_format.encode(draw.random((len(items), 2)), "float32"),
        "decayed_count": [float(x) for x in draw.integers(1, 9, len(items))],
        "event_date": [days_of(number).start] * len(items),
    }
    table = tables.item_tokens("shop")
    rows_now = as_table(columns, table.schema)
    commit = COMMIT | {"line": line}
    delta.replace(lake, table, rows_now, days_of(number), commit=commit, line=line)


def extended(lake: str, folder: Path, days: Days | None = None) -> UserIndex:
    return UserIndex.extended(lake, DOMAIN, folder, days=days, lines=[LINE], fields=True)


def built(lake: str, folder: Path, days: Days | None = None) -> UserIndex:
    return UserIndex.build(lake, DOMAIN, folder, days=days, lines=[LINE], fields=True)


def content(index: UserIndex) -> list[bytes]:
    """All that an index says, as bytes of its own."""
    return [np.ascontiguousarray(array).tobytes() for array in index_arrays(index)]


def asked() -> list[tuple[int, int]]:
    """Users and items, at every half day."""
    moments = [to_us(midnight(DAY)) + half * US_A_DAY // 2 for half in range(2 * NUM_DAYS + 4)]
    return [(key * 10**17 if key > 3 else key, m) for key in range(-4, 6) for m in moments]


def said(index: UserIndex, device: str = "cpu") -> dict[str, Any]:
    """What its store says; rows have other numbers where they have other places."""
    store = IndexStore(index, LINE, device)
    found = asked_of(store, asked(), 9)
    row = found.pop("row_BL").cpu()
    instance_id = torch.from_numpy(np.array(store.index.arrays["instance_id"]))
    return found | {"instance": torch.where(row < 0, -1, instance_id[row.clamp(min=0)])}


@contextmanager
def never_built() -> Iterator[None]:
    """Nothing is built as a whole meanwhile."""

    def refused(*given: Any, **more: Any) -> None:
        raise AssertionError("the index was built as a whole")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(index_build, "build", refused)
        yield


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=12)
@given(first=st.integers(0, NUM_DAYS - 1), steps=STEPS)
@example(first=0, steps=[([0], ["items"], 0)])
def test_an_extended_index_is_the_built_one_and_opened_ones_stay(
    device: str, first: int, steps: list[tuple[list[int], list[str], int]]
) -> None:
    with tempfile.TemporaryDirectory() as temp:
        lake, folder = f"{temp}/lake", Path(temp) / "index"
        write_day(lake, first)
        opened = [extended(lake, folder)]
        held = [content(opened[0])]
        for numbers, what, seed in steps:
            # A day's events come before its tokens, as its jobs do.
            there = set(np.unique([r.date() for r in event_dates(lake)]))
            for number in numbers:
                is_there = days_of(number).start in there
                write_day(lake, number, seed, what if is_there else WRITTEN)
            with never_built():
                index = extended(lake, folder)
            whole = built(lake, Path(temp) / "whole")
            assert content(index) == content(whole)
            assert_same(said(index, device), said(whole))
            assert index.meta.tables == whole.meta.tables
            opened.append(index)
            held.append(content(index))
        assert [content(index) for index in opened] == held


def event_dates(lake: str) -> list[Any]:
    times = delta.read(lake, tables.histories(DOMAIN), columns=["event_time"])["event_time"]
    return list(times.to_pylist())


@pytest.fixture
def grown(lake: str, tmp_path: Path) -> UserIndex:
    """Four days, the last ones extended, one with labels that came late."""
    folder = tmp_path / "index"
    for number in range(4):
        write_day(lake, number)
        if number > 1:
            write_day(lake, number - 1, seed=1)
        extended(lake, folder)
    index = UserIndex.open(folder)
    assert index.meta.generation == 3
    assert not index.is_compact
    return index


def test_whole_array_readers_leave_out_rows_that_are_nobodys(
    lake: str, grown: UserIndex, tmp_path: Path
) -> None:
    whole = built(lake, tmp_path / "whole")
    user_ids, as_of = (torch.tensor(column) for column in zip(*asked(), strict=True))
    item = torch.arange(len(user_ids)) % 4
    features = [
        MatchIndex.build(index).features(user_ids, as_of, item, {"f_brand": item})
        for index in (grown, whole)
    ]
    assert torch.equal(*features)
    assert (features[0] > 0).any(dim=0).all()
    stores = [with_shuffled_tokens(IndexStore(index, LINE), 3) for index in (grown, whole)]
    fetched = [store.fetch(user_ids, as_of, 9).token_BLD for store in stores]
    assert torch.equal(*fetched)
    assert fetched[0].any()


def test_an_index_that_is_current_is_left_alone(
    lake: str, grown: UserIndex, tmp_path: Path
) -> None:
    def stamps() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.*")}

    before = stamps()
    extended(lake, tmp_path / "index")
    assert stamps() == before
    write_tokens(lake, rows_of(1), line="another", days=days_of(1))
    write_items(lake, 1, line="another")
    with never_built():
        meta = extended(lake, tmp_path / "index").meta
    assert {name for name, at in stamps().items() if before[name] != at} == {"meta.json"}
    name = "instance_tokens/shop"
    assert meta == replace(
        grown.meta,
        tables=grown.meta.tables
        | {x: grown.meta.tables[x] + 1 for x in (name, name.replace("instance", "item"))},
    )


def spoiled(lake: str, kept: set[str]) -> None:
    """Every data file of other days becomes noise of the same length."""
    for path in Path(lake).rglob("*.parquet"):
        if "_delta_log" not in path.parts and not any(f"event_date={x}" in str(path) for x in kept):
            path.write_bytes(os.urandom(path.stat().st_size))


def test_a_day_reads_no_file_of_another_day(lake: str, grown: UserIndex, tmp_path: Path) -> None:
    write_day(lake, 4)
    write_day(lake, 3, seed=1)
    whole = content(built(lake, tmp_path / "whole"))
    spoiled(lake, {str(days_of(3).start), str(days_of(4).start)})
    with never_built():
        assert content(extended(lake, tmp_path / "index")) == whole
    with pytest.raises(Exception, match=r"(?i)parquet"):
        built(lake, tmp_path / "whole")


def test_days_that_an_index_was_not_asked_for_come_when_they_are(lake: str, tmp_path: Path) -> None:
    for number in range(4):
        write_day(lake, number)
    folder, whole = tmp_path / "index", tmp_path / "whole"
    start = DAY + timedelta(days=1)
    until = [Days(start, DAY + timedelta(days=n)) for n in (2, 3, 4)]
    assert content(extended(lake, folder, until[0])) == content(built(lake, whole, until[0]))
    write_day(lake, 3, seed=1)
    write_day(lake, 1, seed=1)
    for days in (until[1], until[2]):
        expected = content(built(lake, whole, days))
        with never_built():
            assert content(extended(lake, folder, days)) == expected
    with never_built():  # one that holds more stays so
        assert extended(lake, folder, until[0]).meta.held_days == until[2]


class Killed(BaseException):
    """Not caught by anything."""


def steps_of(patched: pytest.MonkeyPatch, at: int, end: Callable[[], None]) -> Callable[[], int]:
    """From now on every operation on a file of an index is counted, and instead of the one numbered
    `at`, or half way through it where it writes rows, comes the end."""
    count = 0

    def counted(place: Any, name: str) -> None:
        do = getattr(place, name)

        def step(*given: Any) -> Any:
            nonlocal count
            count += 1
            if count == at + 1:
                if do is put:
                    writer, array, rows, values = given
                    few = slice(len(rows) // 2)
                    put(writer, array, rows[few], values[few] if np.ndim(values) else values)
                end()
            return do(*given)

        patched.setattr(place, name, step)

    put = Writer.put
    operations = [
        (Writer, "put"), (Writer, "copy"), (os, "posix_fallocate"), (os, "pwrite"), (np, "save"),
        (Path, "replace"), (Path, "unlink"),
    ]  # fmt: skip
    for place, name in operations:
        counted(place, name)
    return lambda: count


def raise_killed() -> None:
    raise Killed


def test_an_extension_killed_anywhere_leaves_the_old_index_and_goes_on(
    lake: str, grown: UserIndex, tmp_path: Path
) -> None:
    folder, place = tmp_path / "index", tmp_path / "copy"
    old = content(grown)
    write_day(lake, 4)
    write_day(lake, 3, seed=1)
    new = content(built(lake, tmp_path / "whole"))
    told: list[bool] = []
    is_done = False
    while not is_done:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        opened, is_done = UserIndex.open(place), True
        with pytest.MonkeyPatch.context() as patched:
            steps_of(patched, len(told), raise_killed)
            try:
                extended(lake, place)
            except Killed:
                is_done = False
        left = content(UserIndex.open(place))
        assert left in (old, new)
        told.append(left == new)
        with never_built():
            assert content(extended(lake, place)) == new
        assert content(opened) == old
    assert len(told) > 50
    # It is new from the moment on that its meta is moved in.
    assert told == sorted(told)


def kill_me(lake: str, folder: Path, at: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        steps_of(patched, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        extended(lake, folder)


@pytest.mark.parametrize("at", [5, 50])
def test_an_extension_that_is_killed_for_real(
    lake: str, grown: UserIndex, tmp_path: Path, at: int
) -> None:
    folder = tmp_path / "index"
    old = content(grown)
    write_day(lake, 4)
    write_day(lake, 3, seed=1)
    process = multiprocessing.get_context("spawn").Process(target=kill_me, args=(lake, folder, at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert content(UserIndex.open(folder)) == old
    new = content(built(lake, tmp_path / "whole"))
    with never_built():
        assert content(extended(lake, folder)) == new
    assert content(grown) == old


def test_two_at_once_extend_it_once(lake: str, grown: UserIndex, tmp_path: Path) -> None:
    write_day(lake, 4)
    with ThreadPoolExecutor(4) as pool, never_built():
        found = list(pool.map(lambda _: extended(lake, tmp_path / "index"), range(4)))
    assert {index.meta.generation for index in found} == {grown.meta.generation + 1}
    assert all(content(index) == content(found[0]) for index in found)


def test_old_generations_are_cleared_away(lake: str, grown: UserIndex, tmp_path: Path) -> None:
    names = {path.name for path in (tmp_path / "index").glob("users.*")}
    assert names == {f"users.{part}.{n}.npy" for part in ("keys", "pages") for n in (2, 3)}


def erased(lake: str) -> None:
    table = tables.histories(DOMAIN)

    def without(rows: pa.Table) -> pa.Table:
        return rows.slice(1)

    delta.rewrite(lake, table, [DAY], lambda: without, commit=COMMIT)


def made_anew(lake: str) -> None:
    table = tables.histories(DOMAIN)
    rows = delta.read(lake, table)
    shutil.rmtree(delta.uri(lake, table))
    for _ in range(20):
        delta.replace(lake, table, rows, Days(DAY, DAY + timedelta(days=9)), commit=COMMIT)


def by_another_hand(lake: str) -> None:
    delta.open_table(lake, tables.histories(DOMAIN)).delete(f"event_date = '{DAY}'")


def in_other_buckets(lake: str) -> None:
    for number in range(4):
        rows, days = rows_of(number, 1 if number in (1, 2) else 0), days_of(number)
        write_events(lake, rows, buckets=5, days=days)
        write_tokens(lake, rows, line=LINE, buckets=5, days=days)


@pytest.mark.parametrize("change", [erased, made_anew, by_another_hand, in_other_buckets])
def test_what_does_not_say_which_days_changed_is_built_as_a_whole(
    lake: str, grown: UserIndex, tmp_path: Path, change: Callable[[str], None]
) -> None:
    change(lake)
    index = extended(lake, tmp_path / "index")
    assert index.is_compact
    assert content(index) == content(built(lake, tmp_path / "whole"))


def test_half_waste_is_too_much(
    lake: str, grown: UserIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_extend, "SMALL", 0)
    for seed in range(2, 9):
        write_day(lake, 3, seed)
        index = extended(lake, tmp_path / "index")
        assert index.num_rows <= 2 * len(index)
        if index.is_compact:
            break
    assert index.is_compact
    assert content(index) == content(built(lake, tmp_path / "whole"))


def test_a_full_disk_is_no_crash_and_changes_nothing(
    lake: str, grown: UserIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = content(grown)
    write_events(lake, rows_of(4, num=300), days=days_of(4))

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(index_files.os, "posix_fallocate", full)
        with pytest.raises(RetryableError, match=r"could not extend the index .* No space left"):
            extended(lake, tmp_path / "index")
    assert content(UserIndex.open(tmp_path / "index")) == old
    assert content(extended(lake, tmp_path / "index")) != old


def test_a_part_of_an_index_is_never_taken_for_one(lake: str, tmp_path: Path) -> None:
    write_day(lake, 0)
    folder = tmp_path / "index"
    UserIndex.build(lake, DOMAIN, folder, days=None, lines=[LINE], only_users=[0])
    write_day(lake, 1)
    index = extended(lake, folder)
    whole = UserIndex.build(lake, DOMAIN, tmp_path / "whole", days=None, lines=[LINE])
    assert content(index) == content(whole)


def test_a_folder_of_something_else_is_left_alone(lake: str, tmp_path: Path) -> None:
    write_day(lake, 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="build it first"):
        extended(lake, tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_a_feature_that_came_since_is_in_the_index(lake: str, tmp_path: Path) -> None:
    write_day(lake, 0)
    folder = tmp_path / "index"
    assert extended(lake, folder).arrays["numbers"].shape[1] == 1
    more = {"name": "weight", "column": "weight", "kind": "number"}
    domain = parse(RAW | {"feature": [*RAW["feature"], more]})
    index = UserIndex.extended(lake, domain, folder, days=None)
    assert index.arrays["numbers"].shape[1] == 2


def files_with(folder: Path, instance_id: int) -> set[str]:
    sign = instance_id.to_bytes(8, "little", signed=True)
    return {path.name for path in folder.rglob("*.npy") if sign in path.read_bytes()}


def test_an_erasure_leaves_no_row_of_before_in_an_extended_index(
    lake: str, grown: UserIndex, tmp_path: Path
) -> None:
    folder = tmp_path / "index"
    gone = ({r.instance_id for r in rows_of(2)} - {r.instance_id for r in rows_of(2, 1)}).pop()
    assert gone not in grown.arrays["instance_id"][grown.rows]
    assert files_with(folder, gone)
    assert rebuilt(lake, DOMAIN, folder)  # though its tables are as they were
    assert not files_with(folder, gone)
    assert UserIndex.open(folder).is_compact
    assert not rebuilt(lake, DOMAIN, folder)


def test_a_ranker_extends_the_index_that_it_is_given(lake: str, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    args = Args(domain="", lake=lake, out="", arm="match", line=LINE, index=str(folder))

    def given(num_days: int) -> UserIndex:
        days = Days(DAY, DAY + timedelta(days=num_days))
        return user_index(args, DOMAIN, days, tmp_path / "none", None)

    for number in range(3):
        write_day(lake, number)
    first = given(2)
    assert (first.meta.generation, len(first)) == (0, len(rows_of(0) + rows_of(1)))
    assert given(2).meta == first.meta
    with never_built():
        index = given(3)
    assert (index.meta.generation, len(index)) == (1, len(first) + len(rows_of(2)))
