"""MovieLens ratings: GroupLens's own files (1M or a CSV release), or Parquet of the same tables.

One row per rating, with the movie (title, year, genres) and, where the release describes them, the
user. The rating itself is a fact known only after the event. GroupLens's terms: research use, not
to be passed on; so the project brings no copy.
"""

from __future__ import annotations

from pathlib import Path

import duckdb

from pipelines.errors import InputError
from pipelines.sources.sample import Sample, connect, write_sample

WHERE = (
    "get MovieLens 1M (ml-1m.zip, 6 MB) from grouplens.org/datasets/movielens/1m, unpack it, and "
    "pass --data FOLDER, the folder that holds ratings.dat, users.dat and movies.dat "
    "(ratings.csv and movies.csv of a newer release serve too)"
)

NO_USERS = """
SELECT
    NULL::BIGINT AS user_id, NULL::VARCHAR AS gender, NULL::VARCHAR AS age,
    NULL::VARCHAR AS occupation, NULL::VARCHAR AS zip
WHERE false
"""

# The title ends with the year in brackets; later releases have a few titles without one.
EVENTS = r"""
CREATE VIEW events AS
SELECT
    r.user_id AS user_key, r.user_id, r.item_id,
    to_timestamp(r.timestamp) AS event_time, CAST(r.rating AS DOUBLE) AS rating,
    m.title, nullif(regexp_extract(m.title, '\((\d{4})\)\s*$', 1), '') AS year,
    nullif(m.genres, '(no genres listed)') AS genres,
    u.gender, CAST(u.age AS VARCHAR) AS age, CAST(u.occupation AS VARCHAR) AS occupation,
    left(CAST(u.zip AS VARCHAR), 3) AS zip_prefix
FROM ratings r
LEFT JOIN movies m USING (item_id)
LEFT JOIN users u USING (user_id)
"""


def write(path: Path, sample: Sample) -> None:
    """The ratings of the wanted users and days as Parquet, in time order."""
    if sample.data is None or not sample.data.is_dir():
        came = "no folder was given" if sample.data is None else f"{sample.data} is not a folder"
        raise InputError(f"MovieLens needs its data: {came}; {WHERE}")
    connection = connect()
    tables = _tables(sample.data)
    try:
        for name, select in tables.items():
            connection.execute(f"CREATE VIEW {name} AS {select}")
        connection.execute(EVENTS)
        write_sample(connection, path, sample, order_by="event_time, user_id, item_id")
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{sample.data} does not read as MovieLens: {reason}; {WHERE}") from error


def _tables(folder: Path) -> dict[str, str]:
    """SQL for ratings, movies and users, whichever of the known layouts the folder has."""
    if (folder / "ratings.dat").is_file():
        return {
            "ratings": _dat(
                _needed(folder, "ratings.dat"),
                "user_id BIGINT, item_id BIGINT, rating DOUBLE, timestamp BIGINT",
            ),
            "movies": _dat(
                _needed(folder, "movies.dat"), "item_id BIGINT, title VARCHAR, genres VARCHAR"
            ),
            "users": _dat(
                _needed(folder, "users.dat"),
                "user_id BIGINT, gender VARCHAR, age VARCHAR, occupation VARCHAR, zip VARCHAR",
            ),
        }
    if (folder / "ratings.csv").is_file():
        ratings, movies = _needed(folder, "ratings.csv"), _needed(folder, "movies.csv")
        return {
            "ratings": "SELECT userId AS user_id, movieId AS item_id, rating, timestamp "
            f"FROM read_csv('{ratings}')",
            "movies": f"SELECT movieId AS item_id, title, genres FROM read_csv('{movies}')",
            "users": NO_USERS,
        }
    if (folder / "interactions.parquet").is_file():
        users = folder / "users.parquet"
        return {
            "ratings": f"FROM read_parquet('{_quoted(folder / 'interactions.parquet')}')",
            "movies": f"FROM read_parquet('{_needed(folder, 'items.parquet')}')",
            "users": f"FROM read_parquet('{_quoted(users)}')" if users.is_file() else NO_USERS,
        }
    raise InputError(f"{folder} holds no ratings.dat, ratings.csv or interactions.parquet; {WHERE}")


def _dat(file: str, columns: str) -> str:
    """A file with `::` between its fields, in Latin-1, without a header or quotes."""
    named = ", ".join(
        f"'{name}': '{kind}'" for name, kind in (column.split() for column in columns.split(", "))
    )
    return (
        f"SELECT * FROM read_csv('{file}', delim = '::', header = false, quote = '', escape = '', "
        f"encoding = 'latin-1', auto_detect = false, columns = {{{named}}})"
    )


def _needed(folder: Path, name: str) -> str:
    if not (folder / name).is_file():
        raise InputError(f"{folder} lacks {name}; {WHERE}")
    return _quoted(folder / name)


def _quoted(file: Path) -> str:
    return str(file).replace("'", "''")
