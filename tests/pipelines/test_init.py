"""Drafts of domain files: right where the log tells, honest where it does not."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from jobs.init import Args, main
from pipelines.column_facts import open_log
from pipelines.domain import Domain, check_columns, load
from pipelines.draft import num_buckets
from pipelines.draft_roles import slug
from pipelines.errors import InputError

NUM_ROWS = 1200
START = datetime(2026, 3, 1, 9, tzinfo=UTC)


def shop(**changes: Any) -> pa.Table:
    """Two candidates a request; two fields each of the item and the event, one of the others."""
    n = range(NUM_ROWS)
    item = [(5 * i) % 49 for i in n]
    columns: dict[str, Any] = {
        "VisitorID": [f"v{(i // 2) % 100}" for i in n],
        "product_id": item,
        "request_id": [i // 2 for i in n],
        "event_time": [START + timedelta(minutes=i // 2) for i in n],
        "is_click": [int((i * i) % 5 == 0) for i in n],
        "price": [float((p + 1) ** 3) for p in item],
        "tags": [f"t{p % 7}|t{p % 5}" for p in item],
        "country": [["de", "fr", None, "jp"][(i // 2) % 100 % 4] for i in n],
        "page": [f"page {(i // 2) * 13 % 11}" for i in n],
        "position": [i % 2 for i in n],
        "watch_s": [float(i % 97) / 3 for i in n],
        "event_uuid": [f"{i:032x}" for i in n],
        "channel": ["web"] * NUM_ROWS,
        "name": [f"The {p}th product" for p in item],
    }
    return pa.table({k: v for k, v in (columns | changes).items() if v is not None})


def drafted(table: pa.Table, folder: Path, **args: Any) -> tuple[Domain, dict[str, Any], str]:
    pq.write_table(table, folder / "shop.parquet")
    out = folder / "draft.toml"
    said = main(Args(data=str(folder / "shop.parquet"), out=out, **args))
    return load(str(out)), said, out.read_text()


def features(domain: Domain) -> dict[str, tuple[str, str, str]]:
    return {f.name: (f.kind, f.side, f.known) for f in domain.features}


def test_a_draft_of_a_plain_log_is_complete_and_right(tmp_path: Path) -> None:
    domain, said, text = drafted(shop(), tmp_path)
    assert said["fill_in"] == []
    assert domain.name == "shop"
    columns = domain.columns
    assert (columns.user, columns.item, columns.time) == ("VisitorID", "product_id", "event_time")
    assert (columns.request, columns.time_unit) == ("request_id", "timestamp")
    assert [(x.name, x.column, x.at_least) for x in domain.labels] == [("click", "is_click", None)]
    assert domain.negatives is None
    assert features(domain) == {
        "item": ("category", "item", "request"),
        "user": ("category", "user", "request"),
        "price": ("number", "item", "request"),
        "tags": ("multi-category", "item", "request"),
        "country": ("category", "user", "request"),
        "page": ("category", "context", "request"),
        "position": ("category", "event", "request"),
        "watch_s": ("number", "event", "after"),
        "hour": ("category", "context", "request"),
        "weekday": ("category", "context", "request"),
    }
    assert set(said["left_out"]) == {"event_uuid", "channel", "name"}
    seen = "3 values, missing in 25.0%; the same in 100.0% of rows of one VisitorID"
    assert f'column = "country"  # {seen}' in text


def test_buckets_leave_room_and_numbers_are_scaled_from_quantiles(tmp_path: Path) -> None:
    found = {f.name: f for f in drafted(shop(), tmp_path)[0].features}
    assert found["item"].buckets == 256
    assert found["user"].buckets == 512
    assert (found["tags"].max_length, found["tags"].buckets) == (2, 32)
    assert found["price"].transform == "log"
    assert found["watch_s"].transform == "none"
    assert found["watch_s"].center == pytest.approx(16, abs=0.5)
    assert found["watch_s"].scale == pytest.approx(0.9 * 32 / 3.29, abs=0.5)


@pytest.mark.parametrize(("values", "buckets"), [(0, 16), (4, 16), (5, 32), (64, 256), (65, 512)])
def test_buckets_are_a_power_of_two_four_times_the_values(values: int, buckets: int) -> None:
    assert num_buckets(values) == buckets


@pytest.mark.parametrize("kind", ["parquet", "csv", "delta", "parquet folder"])
def test_every_kind_of_log_gives_the_same_draft(tmp_path: Path, kind: str) -> None:
    data = tmp_path / f"shop.{kind}"
    if kind == "parquet":
        pq.write_table(shop(), data)
    elif kind == "csv":
        pa.csv.write_csv(shop(), data)
    elif kind == "delta":
        write_deltalake(str(data), shop())
    else:
        data.mkdir()
        for part in (0, 1):
            pq.write_table(shop().slice(part * 700, 700), data / f"part-{part}.parquet")
    main(Args(data=str(data), out=tmp_path / "x.toml", name="shop"))
    domain = load(str(tmp_path / "x.toml"))
    expected, _, _ = drafted(shop(), tmp_path)
    assert domain.source.format == kind.split()[0]
    assert (domain.folder / domain.source.path).resolve() == data.resolve()
    assert domain.features == expected.features
    assert domain.labels == expected.labels
    assert domain.columns.time_unit == ("iso" if kind == "csv" else "timestamp")
    check_columns(domain, shop().column_names)


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6)])
def test_the_unit_of_a_number_of_time_is_told_by_its_size(
    tmp_path: Path, unit: str, factor: int
) -> None:
    seconds = [(int(START.timestamp()) + 60 * i) * factor for i in range(NUM_ROWS)]
    domain, _, _ = drafted(shop(event_time=None, ts=seconds), tmp_path)
    assert (domain.columns.time, domain.columns.time_unit) == ("ts", unit)


def test_a_time_as_text_is_iso(tmp_path: Path) -> None:
    times = [(START + timedelta(minutes=i)).isoformat() for i in range(NUM_ROWS)]
    domain, _, _ = drafted(shop(event_time=times), tmp_path)
    assert domain.columns.time_unit == "iso"


def test_lists_are_multi_category(tmp_path: Path) -> None:
    lists = [["a", "b", "c"][: 1 + i % 3] for i in range(NUM_ROWS)]
    found = {f.name: f for f in drafted(shop(tags=lists), tmp_path)[0].features}
    assert (found["tags"].kind, found["tags"].max_length) == ("multi-category", 3)


def test_a_rating_becomes_a_label_with_a_mark(tmp_path: Path) -> None:
    ratings = [1.0 + i % 5 for i in range(NUM_ROWS)]
    domain, _, _ = drafted(shop(is_click=None, rating=ratings), tmp_path)
    assert [(x.column, x.at_least) for x in domain.labels] == [("rating", 3)]


def test_a_label_takes_the_time_that_bears_its_name(tmp_path: Path) -> None:
    later = [START + timedelta(days=1, minutes=i) for i in range(NUM_ROWS)]
    domain, _, _ = drafted(shop(click_time=later), tmp_path)
    assert domain.label.time_column == "click_time"
    assert domain.columns.time == "event_time"


def test_without_a_label_every_row_is_positive_and_facts_of_the_event_come_after(
    tmp_path: Path,
) -> None:
    domain, _, text = drafted(shop(is_click=None), tmp_path)
    assert domain.label.always == 1
    assert domain.negatives is not None
    assert "No column looks like a label" in text
    assert features(domain)["position"] == ("category", "event", "after")


def test_what_cannot_be_guessed_is_named_and_the_file_waits_for_it(tmp_path: Path) -> None:
    columns = shop().rename_columns({"VisitorID": "who", "product_id": "what"})
    pq.write_table(columns, tmp_path / "shop.parquet")
    out = tmp_path / "draft.toml"
    said = main(Args(data=str(tmp_path / "shop.parquet"), out=out))
    assert said["fill_in"] == ["user", "item"]
    with pytest.raises(InputError, match=r"needs `user`, which is missing"):
        load(str(out))
    text = out.read_text()
    assert '# user = ""  # FILL IN' in text
    out.write_text(
        text.replace('# user = ""', 'user = "who"').replace('# item = ""', 'item = "what"')
    )
    assert load(str(out)).columns.user == "who"


def test_odd_names_and_paths_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s "here"'
    folder.mkdir()
    odd = shop().rename_columns({"page": 'the "page" \\ of 7\'s', "position": "2nd position"})
    domain, _, _ = drafted(odd, folder)
    check_columns(domain, odd.column_names)
    assert {"the_page_of_7_s", "f_2nd_position"} <= set(features(domain))


def test_a_nearly_constant_column_is_not_taken_for_the_items(tmp_path: Path) -> None:
    """Rows of an item agree on it in 99 of 100 cases, but so do any two rows."""
    alarms = [int(i % 200 == 3) for i in range(NUM_ROWS)]
    domain, _, _ = drafted(shop(alarm=alarms), tmp_path)
    assert features(domain)["alarm"] == ("category", "event", "request")


def test_a_column_that_claims_the_name_item_gets_another(tmp_path: Path) -> None:
    domain, _, _ = drafted(shop(item=["a", "b"] * (NUM_ROWS // 2)), tmp_path)
    assert [f.column for f in domain.features if f.name == "item"] == [domain.columns.item]


def test_missing_and_not_finite_numbers_do_not_stop_a_draft(tmp_path: Path) -> None:
    watch = [[1.5, None, float("nan"), float("inf")][i % 4] for i in range(NUM_ROWS)]
    domain, _, _ = drafted(shop(watch_s=watch, price=[None] * NUM_ROWS), tmp_path)
    assert "price" not in features(domain)


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    drafted(shop(), tmp_path)
    out = tmp_path / "draft.toml"
    out.write_text("edited by hand")
    with pytest.raises(InputError, match=r"draft.toml exists.*--force"):
        main(Args(data=str(tmp_path / "shop.parquet"), out=out))
    assert out.read_text() == "edited by hand"
    main(Args(data=str(tmp_path / "shop.parquet"), out=out, force=True))
    assert load(str(out)).name == "shop"


def test_data_that_is_not_there_or_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is nothing at .*nowhere"):
        open_log(str(tmp_path / "nowhere.parquet"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="neither Parquet"):
        open_log(str(tmp_path / "notes.txt"))
    (tmp_path / "broken.parquet").write_text("hello")
    with pytest.raises(InputError, match=r"broken.parquet cannot be read"):
        open_log(str(tmp_path / "broken.parquet"))
    pq.write_table(shop().slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(InputError, match="has no rows"):
        open_log(str(tmp_path / "empty.parquet"))
    (tmp_path / "semicolons.csv").write_text("user;item\n1;2\n3;4\n")
    with pytest.raises(InputError, match="separated by ';'"):
        open_log(str(tmp_path / "semicolons.csv"))


def test_nothing_is_written_where_nothing_can_be_drafted(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        main(Args(data=str(tmp_path / "nowhere.csv"), out=tmp_path / "draft.toml"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["My Shop", "1shop", "shop/x"])
def test_a_bad_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="pass --name"):
        drafted(shop(), tmp_path, name=name)


def test_what_is_said_serves_machines_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, said, _ = drafted(shop(), tmp_path)
    assert set(json.loads(json.dumps(said))) == {
        "file",
        "name",
        "num_features",
        "fill_in",
        "left_out",
    }
    assert "10 features, 3 columns left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "name"),
    [("HouseholdID", "household_id"), ("event time", "event_time"), ("userId", "user_id")],
)
def test_names_are_compared_in_one_spelling(column: str, name: str) -> None:
    assert slug(column) == name
