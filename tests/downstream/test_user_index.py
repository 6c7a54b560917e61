import itertools
import os
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream import index_files
from downstream.index_arrays import ItemArrays
from downstream.token_store import HistoryRow, InMemoryTokenStore, ItemRow, TokenStore
from downstream.user_index import IndexStore, UserIndex
from pipelines import delta, tables, token_format
from pipelines.days import Days, midnight, to_us
from pipelines.domain import parse
from pipelines.errors import InputError
from pipelines.features import NEVER_US
from pipelines.token_format import TokenFormat

SHAPE: dict[str, Any] = {"width": 2, "side": ["f_brand"], "labels": ["buy"]}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
MOMENT = st.integers(0, 12)
"""Few moments and few users, so that ties are the rule."""
ROW = st.builds(
    HistoryRow,
    user_id=st.integers(-2, 2),
    event_time_us=MOMENT,
    instance_id=st.integers(0, 2**40),
    item_id=st.integers(0, 2),
    side=st.fixed_dictionaries({"f_brand": st.integers(0, 3)}),
    labels=st.fixed_dictionaries({"buy": st.tuples(st.sampled_from([None, 0, 1]), MOMENT)}),
    token=st.none() | st.lists(st.integers(1, 9), min_size=2, max_size=2),
    available_us=MOMENT,
)
ROWS = st.lists(ROW, max_size=20)
ITEMS = st.lists(
    st.builds(
        ItemRow,
        item_id=st.integers(-1, 2),
        available_us=MOMENT,
        decayed_sum=st.lists(st.integers(1, 9), min_size=2, max_size=2),
        decayed_count=st.integers(1, 5),
    ),
    max_size=12,
    unique_by=lambda r: (r.item_id, r.available_us),
)
ASKED = st.lists(st.tuples(st.integers(-3, 3), st.integers(-1, 14)), min_size=1, max_size=8)


def asked_of(store: TokenStore, asked: list[tuple[int, int]], length: int) -> dict[str, Any]:
    """All that a store says, by name, for comparison."""
    ids, as_of_us = (torch.tensor(column) for column in zip(*asked, strict=True))
    tokens = store.fetch(ids, as_of_us, length)._asdict()
    side = {f"side {name}": column for name, column in tokens.pop("side").items()}
    return tokens | side | store.fetch_items(ids, as_of_us)._asdict()


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor.cpu(), expected[name].cpu()), name


def unique(rows: list[HistoryRow]) -> list[HistoryRow]:
    return [replace(row, instance_id=i * 7919 % 1009) for i, row in enumerate(rows)]


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=80)
@given(rows=ROWS, items=ITEMS, asked=ASKED, length=st.integers(0, 6))
def test_the_index_says_bit_for_bit_what_its_plain_twin_says(
    device: str,
    rows: list[HistoryRow],
    items: list[ItemRow],
    asked: list[tuple[int, int]],
    length: int,
) -> None:
    rows = unique(rows)
    twin = InMemoryTokenStore(rows, items=items, **SHAPE)
    index = IndexStore.from_rows(rows, items=items, device=device, **SHAPE)
    assert_same(asked_of(index, asked, length), asked_of(twin, asked, length))


@pytest.mark.parametrize("device", DEVICES)
def test_any_of_the_side_columns_come_as_they_are_asked_for(device: str) -> None:
    draw = np.random.default_rng(0)
    side, labels = ["f_a", "f_b"], ["buy", "click"]
    rows = [
        HistoryRow(
            user_id=int(draw.integers(5)), event_time_us=at, instance_id=at, item_id=0,
            side={name: int(draw.integers(9)) for name in side},
            labels={
                name: ((None, 0, 1)[draw.integers(3)], at + int(draw.integers(9)))
                for name in labels
            },
        )
        for at in range(400)
    ]  # fmt: skip
    store = IndexStore.from_rows(rows, width=2, side=side, labels=labels, device=device)
    user, moment = torch.arange(-1, 7).repeat(50), torch.arange(400)
    found = store.positions(user, moment)
    all_names = ["f_a", "f_b", "label_buy", "label_click"]
    for num in range(5):
        for names in itertools.permutations(all_names, num):
            given, plain = (
                s.past(*found, moment.to(device), 90, side=names) for s in (store, store.plain())
            )
            assert list(given.side) == [*names] == list(plain.side)
            for name in names:
                assert torch.equal(given.side[name], plain.side[name])
                assert given.side[name].count_nonzero() > 1000
    matrix_NF = torch.from_numpy(draw.integers(0, 9, (400, 3))).int().to(device)
    expected = matrix_NF[plain.row_BL.clamp(min=0)]
    assert torch.equal(store.rows_at(matrix_NF, plain.row_BL), expected)
    assert torch.equal(store.plain().rows_at(matrix_NF, plain.row_BL), expected)


@pytest.mark.gpu
@NO_GPU
def test_tokens_that_a_device_has_no_room_for_are_read_from_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("downstream.user_index.FILLED", 0)
    draw = np.random.default_rng(0)
    rows = [
        HistoryRow(
            user_id=int(draw.integers(5)), event_time_us=at, instance_id=at,
            token=draw.standard_normal(3).tolist(), available_us=at + int(draw.integers(99)),
        )
        for at in range(400)
    ]  # fmt: skip
    on_host = IndexStore.from_rows(rows, width=3, device="cuda")
    on_cpu = IndexStore.from_rows(rows, width=3)
    assert on_host.token_ND.is_pinned()
    assert on_host.available_us_N.is_cuda
    user, moment = torch.arange(-1, 7).repeat(50), torch.arange(400)
    expected = on_cpu.fetch(user, moment, 90)
    assert expected.token_BLD.count_nonzero() > 1000
    turned = on_cpu.token_ND.flip(0), on_cpu.available_us_N
    for store, tokens in ((on_host, expected), (on_host.plain(), expected), (
        on_host.with_tokens(*turned), on_cpu.with_tokens(*turned).fetch(user, moment, 90)
    )):  # fmt: skip
        found = store.fetch(user, moment, 90)
        assert found.token_BLD.is_cuda
        assert torch.equal(found.token_BLD.cpu(), tokens.token_BLD)
        assert torch.equal(found.token_mask_BL.cpu(), tokens.token_mask_BL)
    place = on_host.positions(user, moment)
    wide = on_host.past(*place, moment.cuda(), 90, dtype=torch.float32)
    assert torch.equal(wide.token_BLD.cpu(), expected.token_BLD.float())
    none = on_host.past(*place, moment.cuda(), 90, has_tokens=False)
    assert none.token_BLD.shape == (400, 90, 0)
    assert torch.equal(none.row_BL, wide.row_BL)
    monkeypatch.setattr("downstream.user_index.FILLED", 0.7)
    assert IndexStore.from_rows(rows, width=3, device="cuda").token_ND.is_cuda


@settings(deadline=None, max_examples=80)
@given(rows=ROWS, new=ROWS, items=ITEMS, data=st.data(), as_of=MOMENT, user=st.integers(-2, 2))
def test_nothing_of_the_future_moves_a_fetch(
    rows: list[HistoryRow],
    new: list[HistoryRow],
    items: list[ItemRow],
    data: st.DataObject,
    as_of: int,
    user: int,
) -> None:
    """Events, publications, labels and item tokens at or after as_of are changed at will."""

    def disturbed(row: HistoryRow) -> HistoryRow | None:
        other = data.draw(ROW)
        if row.event_time_us >= as_of:
            moved = replace(other, event_time_us=max(other.event_time_us, as_of))
            return data.draw(st.sampled_from([None, moved]))
        if row.available_us >= as_of:
            row = replace(row, token=other.token, available_us=as_of + other.available_us)
        if row.labels["buy"][1] >= as_of:
            row = replace(row, labels={"buy": (other.labels["buy"][0], as_of)})
        return row

    rows = [replace(row, instance_id=i) for i, row in enumerate(rows)]
    later = [replace(r, event_time_us=max(r.event_time_us, as_of)) for r in new]
    changed = [x for r in rows if (x := disturbed(r)) is not None] + later
    items_changed = [r for r in items if r.available_us < as_of]
    items_changed.append(
        ItemRow(item_id=user, available_us=as_of, decayed_sum=[5, 5], decayed_count=1)
    )
    before = IndexStore.from_rows(rows, items=items, **SHAPE)
    after = IndexStore.from_rows(changed, items=items_changed, **SHAPE)
    held, moved = (asked_of(s, [(user, as_of)], 20) for s in (before, after))
    # A row's number counts the rows of other users too: it is no fact about this one's past.
    del held["row_BL"], moved["row_BL"]
    assert_same(moved, held)


def test_positions_count_the_events_strictly_before_as_of() -> None:
    rows = [
        HistoryRow(user_id=u, event_time_us=t, instance_id=t) for u in (1, 5) for t in (3, 4, 4)
    ]
    store = IndexStore.from_rows(rows, **SHAPE)
    user, num = store.positions(torch.tensor([5, 5, 1, 2]), torch.tensor([4, 5, 3, 9]))
    assert user.tolist() == [1, 1, 0, -1]
    assert num.tolist() == [1, 3, 0, 0]
    row, mask = store.newest(user, num, 2)
    assert row.tolist() == [[-1, 3], [4, 5], [-1, -1], [-1, -1]]
    assert mask.tolist() == [[False, True], [True, True], [False, False], [False, False]]


def test_other_tokens_change_tokens_only_and_may_be_written_in_place() -> None:
    rows = [HistoryRow(user_id=1, event_time_us=t, instance_id=t) for t in range(3)]
    store = IndexStore.from_rows(rows, **SHAPE)
    token, available_us = torch.zeros(3, 1, dtype=torch.float16), torch.full((3,), NEVER_US)
    other = store.with_tokens(token, available_us)
    token[1], available_us[1] = 5.0, 1
    found = other.fetch(torch.tensor([1]), torch.tensor([9]), 3)
    assert found.token_BLD[0, :, 0].tolist() == [0.0, 5.0, 0.0]
    assert found.token_mask_BL[0].tolist() == [False, True, False]
    assert (store.width, other.width) == (2, 1)
    with pytest.raises(ValueError, match="one row per event of the index, 3; got 2 tokens"):
        store.with_tokens(token[:2], available_us[:2])


def test_rows_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="sorted by"):
        UserIndex.from_arrays(
            user_id=np.array([2, 1]), event_time_us=np.zeros(2), item_id=np.zeros(2)
        )


RAW: dict[str, Any] = {
    "name": "shop",
    "source": {"path": "x"},
    "columns": {"user": "u", "item": "i", "time": "t"},
    "label": [{"name": "buy", "column": "buy"}],
    "feature": [
        {"name": "brand", "column": "brand", "side": "item"},
        {"name": "price", "column": "price", "kind": "number"},
        {"name": "tags", "column": "tags", "kind": "multi-category", "max_length": 2},
    ],
}
DOMAIN = parse(RAW)
DAY = date(2026, 3, 1)
DAYS = Days(DAY, DAY + timedelta(days=3))
COMMIT = {"job": "test"}
FORM = TokenFormat("float16", 2)


def random_rows(num: int = 60, seed: int = 0) -> list[HistoryRow]:
    """A little log of three days with ties, late labels and some events without a token."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num):
        day = int(rng.integers(3))
        start_us = to_us(midnight(DAY)) + day * 86_400_000_000
        time_us = start_us + int(rng.integers(5)) * 1_000_000
        rows.append(
            HistoryRow(
                user_id=int(rng.integers(-4, 4)) * 10**17,
                event_time_us=time_us,
                instance_id=int(rng.permutation(num)[0]) * 1000 + i,
                item_id=int(rng.integers(4)),
                request_id=i,
                side={"f_brand": int(rng.integers(4))},
                labels={"buy": (int(rng.integers(2)), time_us + int(rng.integers(10**11)))},
                token=[float(x) for x in rng.integers(1, 9, 2)] if rng.random() < 0.8 else None,
                available_us=start_us + 86_400_000_000,
            )
        )
    return rows


def day_of(row: HistoryRow) -> date:
    return DAY + timedelta(days=(row.event_time_us - to_us(midnight(DAY))) // 86_400_000_000)


def write_lake(
    lake: str, rows: list[HistoryRow], *, line: str = "main", buckets: int = 3, days: Days = DAYS
) -> None:
    """The tables of these rows, as the jobs would write them."""
    write_events(lake, rows, buckets=buckets, days=days)
    write_tokens(lake, rows, line=line, buckets=buckets, days=days)


def write_events(lake: str, rows: list[HistoryRow], *, buckets: int = 3, days: Days = DAYS) -> None:
    """Histories and the stream of these rows."""
    columns = {
        "instance_id": [r.instance_id for r in rows],
        "user_id": [r.user_id for r in rows],
        "item_id": [r.item_id for r in rows],
        "request_id": [r.request_id for r in rows],
        "event_time": [r.event_time_us for r in rows],
        "user_bucket": [r.user_id % buckets for r in rows],
        "f_brand": [r.side["f_brand"] for r in rows],
        "label_buy": [r.labels["buy"][0] for r in rows],
        "label_time_buy": [r.labels["buy"][1] for r in rows],
        "event_date": [day_of(r) for r in rows],
    }
    histories = tables.histories(DOMAIN)
    delta.replace(lake, histories, as_table(columns, histories.schema), days, commit=COMMIT)
    columns |= {
        "is_sampled": [False] * len(rows),
        "f_price": [float(r.request_id) for r in rows],
        "f_tags": [[r.request_id % 5 + 1] for r in rows],
    }
    # A sampled negative of each: in the stream, never in an index.
    sampled = {k: v + v for k, v in columns.items()}
    sampled["instance_id"] = [*columns["instance_id"], *(-1 - i for i in columns["instance_id"])]
    sampled["is_sampled"] = [False] * len(rows) + [True] * len(rows)
    stream = tables.user_order(DOMAIN)
    delta.replace(lake, stream, as_table(sampled, stream.schema), days, commit=COMMIT)


def write_tokens(
    lake: str,
    rows: list[HistoryRow],
    *,
    line: str,
    buckets: int = 3,
    form: TokenFormat = FORM,
    days: Days = DAYS,
) -> None:
    """Tokens of these rows; and, of all DAYS, two item tokens, whatever the rows."""
    held = [r for r in rows if r.token is not None]
    token = np.array([[*r.token, 0.0, 0.0][: form.width] for r in held if r.token is not None])
    token, commit = token.reshape(-1, form.width), COMMIT | {"line": line}
    columns = {
        "instance_id": [r.instance_id for r in held],
        "user_id": [r.user_id for r in held],
        "item_id": [r.item_id for r in held],
        "event_time": [r.event_time_us for r in held],
        "user_bucket": [r.user_id % buckets for r in held],
        "compressor_line": [line] * len(held),
        "compressor_version": ["v1"] * len(held),
        "available_time": [r.available_us for r in held],
        "token": token_format.encode(token),
        "event_date": [day_of(r) for r in held],
    }
    table = tables.instance_tokens("shop")
    token_format.declare(lake, table, form)
    delta.replace(lake, table, as_table(columns, table.schema), days, commit=commit, line=line)
    items = tables.item_tokens("shop")
    if days != DAYS:
        return
    sums = np.arange(1, 2 * form.width + 1, dtype=np.float32).reshape(2, form.width)
    item_columns = {
        "item_id": [3, 1],
        "compressor_line": [line] * 2,
        "compressor_version": ["v1"] * 2,
        "available_time": [to_us(midnight(DAYS.end)), to_us(midnight(DAY))],
        "decayed_sum": token_format.encode(sums, "float32"),
        "decayed_count": [2.0, 4.0],
        "event_date": [DAY + timedelta(days=2), DAY],
    }
    delta.replace(lake, items, as_table(item_columns, items.schema), DAYS, commit=commit, line=line)


def as_table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    made = [
        pa.array(columns[f.name], pa.int64()).cast(f.type)
        if pa.types.is_timestamp(f.type)
        else pa.array(columns[f.name]).cast(f.type)
        for f in schema
    ]
    return pa.Table.from_arrays(made, schema=schema)


@pytest.mark.parametrize(
    ("rows_at_once", "memory"), [(1, 2**40), (4_000_000, 2**40), (4_000_000, 2000), (5, 1)]
)
def test_an_index_built_from_the_lake_says_what_the_rows_say(
    lake: str, tmp_path: Path, rows_at_once: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("downstream.index_files.ROWS_AT_ONCE", rows_at_once)
    monkeypatch.setattr("downstream.index_build.memory_available", lambda: memory)
    rows = random_rows()
    write_lake(lake, rows)
    index = UserIndex.build(
        lake, DOMAIN, tmp_path / "index", days=None, lines=["main"], fields=True
    )
    items = [
        ItemRow(
            item_id=3,
            available_us=to_us(midnight(DAYS.end)),
            decayed_sum=[1, 2],
            decayed_count=2,
        ),
        ItemRow(item_id=1, available_us=to_us(midnight(DAY)), decayed_sum=[3, 4], decayed_count=4),
    ]
    twin = InMemoryTokenStore(rows, items=items, **SHAPE)
    moments = [r.event_time_us + shift for r in rows for shift in (0, 1, 86_400_000_000)]
    asked = [(r.user_id, moment) for r, moment in zip(rows * 3, moments, strict=True)]
    asked += [(item, moment) for item in (1, 3) for moment in moments]
    store = IndexStore(index, "main")
    assert_same(asked_of(store, asked, 9), asked_of(twin, asked, 9))

    row_BL = torch.tensor([[-1, 5]])
    ids_BLS, numbers_BLM = store.fetch_fields(row_BL)
    request = int(index.arrays["request_id"][5])
    assert ids_BLS[0].tolist() == [[0, 0, 0], [int(index.arrays["f_brand"][5]), request % 5 + 1, 0]]
    assert numbers_BLM[0, 0].isnan().all()
    assert numbers_BLM[0, 1].tolist() == [float(request)]
    assert index.meta.tables == {
        "histories/shop": 1,
        "user_order/shop": 1,
        "instance_tokens/shop": 1,
        "item_tokens/shop": 1,
    }


@pytest.mark.parametrize("advice", [index_files.POPULATE_WRITE, 9999], ids=["at once", "by fault"])
def test_reserved_rows_have_their_disk_space_and_their_fill(
    tmp_path: Path, advice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_files, "POPULATE_WRITE", advice)
    monkeypatch.setattr(index_files, "PIECE", 100_000)
    taken: set[int] = set()

    def take(file: int, at: int, num_bytes: int) -> None:
        taken.update(range(at, at + num_bytes))
        os_fallocate(file, at, num_bytes)

    os_fallocate = os.posix_fallocate
    monkeypatch.setattr(index_files.os, "posix_fallocate", take)
    writer = index_files.Writer(tmp_path)
    writer.allocate("a", (1_000_000,), np.int64)
    writer.allocate("filled", (1000,), np.int64, fill=7)
    writer.allocate("none", (0, 3), np.float16)
    writer.reserve(["a", "none"], slice(500_000, 900_000))
    begin = writer.arrays["a"].offset + 500_000 * 8
    assert taken == (set() if advice != 9999 else set(range(begin, begin + 400_000 * 8)))
    writer.reserve(["filled"], slice(500, 900))
    num_bytes = (tmp_path / "a.npy").stat().st_blocks * 512
    assert 400_000 * 8 <= num_bytes < 450_000 * 8
    assert not writer.arrays["a"].any()
    assert np.flatnonzero(writer.arrays["filled"] == 7).tolist() == [*range(500, 900)]
    assert np.count_nonzero(writer.arrays["filled"]) == 400


def test_a_full_disk_is_an_error_before_anything_is_put(tmp_path: Path) -> None:
    writer = index_files.Writer(tmp_path)
    writer.allocate("a", (1_000_000,), np.int64)
    os.truncate(tmp_path / "a.npy", 0)  # to the kernel as if there were no space for it
    with pytest.raises(OSError, match="No space left on device"):
        writer.reserve(["a"])


def test_an_index_of_some_days_holds_those_and_an_empty_one_is_fine(
    lake: str, tmp_path: Path
) -> None:
    rows = random_rows()
    write_lake(lake, rows)
    first = Days(DAY, DAY + timedelta(days=1))
    index = UserIndex.build(lake, DOMAIN, tmp_path / "index", days=first, lines=["main"])
    assert len(index) == sum(day_of(r) == DAY for r in rows)
    none = Days(DAY + timedelta(days=9), DAY + timedelta(days=9))
    empty = UserIndex.build(lake, DOMAIN, tmp_path / "index", days=none)
    assert len(empty) == 0
    found = IndexStore(empty, None).fetch(torch.tensor([1]), torch.tensor([1]), 2)
    assert found.token_BLD.shape == (1, 2, 0)
    assert not found.mask_BL.any()


def test_lines_never_mix_unnoticed(lake: str, tmp_path: Path) -> None:
    rows = random_rows()
    write_lake(lake, rows)
    doubled = [
        replace(r, token=[2 * x for x in r.token]) if r.token is not None else r for r in rows
    ]
    write_tokens(lake, doubled, line="other")
    index = UserIndex.build(lake, DOMAIN, tmp_path / "index", days=None, lines=["main", "other"])
    user_ids = torch.from_numpy(index.users.key)
    late = torch.full_like(user_ids, NEVER_US)
    main, other = (IndexStore(index, x).fetch(user_ids, late, 9) for x in ("main", "other"))
    assert torch.equal(2 * main.token_BLD, other.token_BLD)
    with pytest.raises(InputError, match=r"'third' was asked for .* holds: main, other"):
        IndexStore(index, "third")
    with pytest.raises(InputError, match="no tokens of line 'third'; lines there: main, other"):
        UserIndex.build(lake, DOMAIN, tmp_path / "index", days=None, lines=["third"])


def test_a_failed_build_leaves_the_old_index_and_no_pieces(lake: str, tmp_path: Path) -> None:
    write_lake(lake, random_rows())
    folder = tmp_path / "made" / "index"
    UserIndex.build(lake, DOMAIN, folder, days=None, lines=["main"])
    stray = random_rows()
    write_tokens(lake, [replace(r, user_id=r.user_id + 1) for r in stray], line="main")
    write_tokens(lake, stray, line="late", buckets=4)
    with pytest.raises(InputError, match="another number of user buckets"):
        UserIndex.build(lake, DOMAIN, folder, days=None, lines=["late"])
    assert [p.name for p in folder.parent.iterdir()] == ["index"]
    assert list(UserIndex.open(folder).lines) == ["main"]


def test_a_width_other_than_the_declared_one_is_refused(lake: str, tmp_path: Path) -> None:
    rows = random_rows()
    write_lake(lake, rows)
    with pytest.raises(InputError, match=r"holds float16 x 2 .* needs float16 x 4"):
        write_tokens(lake, rows, line="wide", form=TokenFormat("float16", 4))
    table = tables.instance_tokens("shop")
    wide = delta.read(lake, table, line="main")
    token = token_format.encode(np.ones((len(wide), 3)))
    wide = wide.set_column(wide.schema.get_field_index("token"), "token", token)
    delta.replace(lake, table, wide, DAYS, commit=COMMIT, line="main")
    with pytest.raises(InputError, match=r"declares float16 x 2 \(4 bytes\) .* has 6 bytes"):
        UserIndex.build(lake, DOMAIN, tmp_path / "index", days=None, lines=["main"])


def test_an_event_under_another_day_than_its_time_is_refused(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days are merged in their order: it would stand behind later events, and be read too late."""
    rows = random_rows()
    late = max(rows, key=lambda row: row.event_time_us)
    right = day_of
    monkeypatch.setitem(globals(), "day_of", lambda row: DAY if row is late else right(row))
    write_events(lake, rows)
    with pytest.raises(InputError, match=f"1 events of {DAY} have a time of another day"):
        UserIndex.build(lake, DOMAIN, tmp_path / "index", days=None)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("days_apart", [0, 1])
def test_an_instance_that_is_there_twice_is_refused(
    lake: str, tmp_path: Path, days_apart: int
) -> None:
    first = random_rows()[0]
    again = replace(first, event_time_us=to_us(midnight(DAY + timedelta(days=days_apart))))
    write_events(lake, [replace(first, event_time_us=to_us(midnight(DAY))), again])
    with pytest.raises(InputError, match="an instance_id twice"):
        UserIndex.build(lake, DOMAIN, tmp_path / "index", days=None)


def test_fields_of_other_days_than_the_histories_are_refused(lake: str, tmp_path: Path) -> None:
    write_lake(lake, random_rows())
    stream = tables.user_order(DOMAIN)
    first = Days(DAY, DAY + timedelta(days=1))
    delta.replace(lake, stream, delta.read(lake, stream, DAYS).slice(0, 0), first, commit=COMMIT)
    with pytest.raises(InputError, match=r"has features of 0 of .* events"):
        UserIndex.build(lake, DOMAIN, tmp_path / "index", days=None, fields=True)


def test_an_index_of_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="build it first"):
        UserIndex.open(tmp_path)
    (tmp_path / "meta.json").write_text('{"format": 0}')
    with pytest.raises(InputError, match="format 0, needed 2"):
        UserIndex.open(tmp_path)


def test_item_rows_come_in_any_order() -> None:
    made = ItemArrays.of(
        np.array([5, 2, 5]), np.array([9, 1, 3]), np.array([[1.0], [2.0], [3.0]]), np.ones(3)
    )
    assert made.segments.key.tolist() == [2, 5]
    assert made.segments.count.tolist() == [1, 2]
    assert made.decayed_sum[:, 0].tolist() == [2.0, 3.0, 1.0]
