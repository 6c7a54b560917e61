import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream import match_features
from downstream.match_features import MatchIndex
from downstream.token_store import HistoryRow
from downstream.user_index import IndexStore

HOUR = 3_600_000_000
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
FIELDS = ["f_brand", "f_size"]
MOMENT = st.integers(0, 10).map(lambda half: half * HOUR // 2)
ROW = st.builds(
    HistoryRow,
    user_id=st.sampled_from([-5, 0, 7]),
    event_time_us=MOMENT,
    instance_id=st.just(0),
    item_id=st.integers(-1, 3),
    side=st.fixed_dictionaries({name: st.integers(0, 2) for name in FIELDS}),
)
ROWS = st.lists(ROW, max_size=25)
ASKED = st.tuples(
    st.sampled_from([-5, 0, 7, 8]), MOMENT, st.integers(-1, 4), st.integers(0, 3), st.integers(0, 3)
)
Asked = tuple[int, int, int, int, int]


def numbered(rows: list[HistoryRow]) -> list[HistoryRow]:
    return [replace(row, instance_id=i) for i, row in enumerate(rows)]


def features_of(
    rows: list[HistoryRow], asked: list[Asked], windows: tuple[int, ...], device: str = "cpu"
) -> torch.Tensor:
    store = IndexStore.from_rows(rows, width=1, side=FIELDS, device=device)
    user, as_of, item, brand, size = (torch.tensor(x) for x in zip(*asked, strict=True))
    matches = MatchIndex.build(store, windows=windows)
    return matches.features(user, as_of, item, {"f_brand": brand, "f_size": size}).cpu()


def scan(rows: list[HistoryRow], asked: Asked, windows: tuple[int, ...]) -> list[float]:
    """The same by looking at every event."""
    user, as_of, item, brand, size = asked
    past = [r for r in rows if r.user_id == user and r.event_time_us < as_of]
    past.sort(key=lambda r: (r.event_time_us, r.instance_id))
    found = []
    for name, value in (("item", item), ("f_brand", brand), ("f_size", size)):
        values = [r.item_id if name == "item" else r.side[name] for r in past]
        is_match = [v == value and not (name != "item" and value == 0) for v in values]
        found += [math.log1p(sum(is_match[-window:])) for window in windows]
        found.append(math.log1p(sum(is_match)))
        gaps = [as_of - r.event_time_us for r, m in zip(past, is_match, strict=True) if m]
        found += [math.log1p(min(gaps) / HOUR), 0.0] if gaps else [0.0, 1.0]
    return [*found, math.log1p(len(past))]


@pytest.mark.parametrize("most", [match_features.MOST, 0], ids=["one sort", "large"])
@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=100)
@given(rows=ROWS, asked=st.lists(ASKED, min_size=1, max_size=8))
def test_features_are_what_scanning_the_past_gives(
    most: int, device: str, rows: list[HistoryRow], asked: list[Asked]
) -> None:
    rows = numbered(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(match_features, "MOST", most)
        found = features_of(rows, asked, (2, 3), device)
    expected = torch.tensor([scan(rows, one, (2, 3)) for one in asked])
    torch.testing.assert_close(found, expected)


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, others=ROWS, asked=ASKED)
def test_events_at_or_after_as_of_move_nothing(
    rows: list[HistoryRow], others: list[HistoryRow], asked: Asked
) -> None:
    rows, as_of = numbered(rows), asked[1]
    past = [r for r in rows if r.event_time_us < as_of]
    future = [replace(r, event_time_us=max(r.event_time_us, as_of)) for r in others]
    assert torch.equal(
        features_of(rows, [asked], (2, 3)), features_of(past + numbered(future), [asked], (2, 3))
    )


def test_windows_count_the_last_100_the_last_256_and_all() -> None:
    rows = [
        HistoryRow(user_id=1, event_time_us=i, instance_id=i, item_id=int(i % 3 == 0))
        for i in range(300)
    ]
    store = IndexStore.from_rows(rows, width=1)
    matches = MatchIndex.build(store)
    one = torch.ones(1, dtype=torch.long)
    found = matches.features(one, one * 300, one, {})[0].tolist()
    named = dict(zip(matches.names, found, strict=True))
    back = [300 - i for i in range(300) if i % 3 == 0]
    assert named == pytest.approx(
        {
            "item_last_100": math.log1p(sum(b <= 100 for b in back)),
            "item_last_256": math.log1p(sum(b <= 256 for b in back)),
            "item_all": math.log1p(100),
            "item_hours": math.log1p(3e-6 / 3600),
            "item_never": 0.0,
            "history_length": math.log1p(300),
        }
    )


def test_a_candidate_without_a_field_is_refused() -> None:
    store = IndexStore.from_rows([], width=1, side=FIELDS)
    one = torch.ones(1, dtype=torch.long)
    with pytest.raises(ValueError, match="need f_size; got f_brand"):
        MatchIndex.build(store).features(one, one, one, {"f_brand": one})
