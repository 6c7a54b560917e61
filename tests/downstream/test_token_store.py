import torch

from downstream.token_store import HistoryRow, InMemoryTokenStore, ItemRow

NOON = 12 * 3_600_000_000
HOUR = 3_600_000_000


def store(*rows: HistoryRow, items: tuple[ItemRow, ...] = ()) -> InMemoryTokenStore:
    return InMemoryTokenStore(rows, width=1, items=items, side=["f_brand"], labels=["buy"])


def event(hour: int, **facts: object) -> HistoryRow:
    given = {"user_id": 7, "event_time_us": hour * HOUR, "instance_id": hour} | facts
    return HistoryRow(**given)  # type: ignore[arg-type]


def ask(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_an_event_of_the_same_instant_is_the_future() -> None:
    rows = [event(11, token=[1.0], available_us=0), event(12, token=[9.0], available_us=0)]
    found = store(*rows).fetch(ask(7), ask(NOON), length=3)
    assert found.token_BLD[0, :, 0].tolist() == [0.0, 0.0, 1.0]
    assert found.mask_BL[0].tolist() == [False, False, True]
    assert found.gap_s_BL[0].tolist() == [0.0, 0.0, 3600.0]
    assert found.row_BL[0].tolist() == [-1, -1, 0]


def test_a_token_published_at_the_same_instant_is_the_future_and_keeps_its_place() -> None:
    rows = [
        event(10, token=[1.0], available_us=NOON - 1),
        event(11, token=[2.0], available_us=NOON),
    ]
    found = store(*rows).fetch(ask(7), ask(NOON), length=2)
    assert found.token_BLD[0, :, 0].tolist() == [1.0, 0.0]
    assert found.token_mask_BL[0].tolist() == [True, False]
    assert found.mask_BL[0].tolist() == [True, True]


def test_a_label_reads_unknown_until_after_it_was_known() -> None:
    known = {9: (1, NOON - 1), 10: (0, NOON - 1), 11: (1, NOON), 8: (None, 0)}
    rows = [event(hour, labels={"buy": label}) for hour, label in known.items()]
    found = store(*rows).fetch(ask(7), ask(NOON), length=5)
    assert found.side["label_buy"][0].tolist() == [0, 0, 2, 1, 0]


def test_the_newest_events_are_kept_oldest_first_ties_by_instance_id() -> None:
    rows = [event(9, instance_id=5), event(9, instance_id=3), event(8, instance_id=9)]
    named = [
        event(10),
        *(HistoryRow(**{**vars(r), "side": {"f_brand": r.instance_id}}) for r in rows),
    ]
    found = store(*named).fetch(ask(7), ask(10 * HOUR), length=2)
    assert found.side["f_brand"][0].tolist() == [3, 5]


def test_a_user_without_a_past_is_all_padding() -> None:
    found = store(event(11)).fetch(ask(8, 7), ask(NOON, 0), length=2)
    assert not found.mask_BL.any()
    assert found.side["f_brand"].tolist() == [[0, 0], [0, 0]]


def test_an_item_token_is_the_mean_of_the_newest_row_published_before() -> None:
    items = (
        ItemRow(item_id=3, available_us=NOON, decayed_sum=[9.0], decayed_count=1.0),
        ItemRow(item_id=3, available_us=NOON - 1, decayed_sum=[6.0], decayed_count=4.0),
        ItemRow(item_id=3, available_us=NOON - 2, decayed_sum=[5.0], decayed_count=1.0),
    )
    found = store(items=items).fetch_items(ask(3, 3, 3, 4), ask(NOON, NOON + 1, 0, NOON))
    assert found.token_BD[:, 0].tolist() == [1.5, 9.0, 0.0, 0.0]
    assert found.count_B.tolist() == [4.0, 1.0, 0.0, 0.0]
    assert found.mask_B.tolist() == [True, True, False, False]
