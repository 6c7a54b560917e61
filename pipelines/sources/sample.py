"""What part of a log is wanted, and the SQL that keeps it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import duckdb
from tqdm import tqdm

from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Which users and days of a log to keep; where it is, if its reader does not bring it."""

    data: Path | None = None
    limit_users: int | None = None
    seed: int = 0
    days: int | None = None

    def __post_init__(self) -> None:
        for name in ("limit_users", "days"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}")

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Name, size and age of every file in `data`: a changed log is prepared again."""
        if self.data is None or not self.data.is_dir():
            return []
        files = sorted(p for p in self.data.iterdir() if p.is_file())
        return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def connect() -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB that writes nothing to the terminal."""
    connection = duckdb.connect()
    connection.execute("SET enable_progress_bar = true")  # without it, no progress is counted
    connection.execute("SET enable_progress_bar_print = false")
    return connection


def write_sample(
    connection: duckdb.DuckDBPyConnection, path: Path, sample: Sample, *, order_by: str
) -> None:
    """The wanted users and days of the view `events` (user_key, event_time, ...), as one file.

    Users are ranked by the MD5 of seed and key: the first N of one order, so samples nest.
    """
    users, days = "", ""
    if sample.limit_users is not None:
        users = (
            "AND user_key IN (SELECT user_key FROM (SELECT DISTINCT user_key FROM events) "
            f"ORDER BY md5('{sample.seed}:' || CAST(user_key AS VARCHAR)) "
            f"LIMIT {sample.limit_users})"
        )
    if sample.days is not None:
        first = connection.execute("SELECT min(epoch(event_time)) FROM events").fetchone()
        assert first is not None
        end = (int(first[0]) // 86_400 + sample.days) * 86_400
        days = f"AND epoch(event_time) < {end}"
    target = str(path).replace("'", "''")
    _run(
        connection,
        "COPY (SELECT * EXCLUDE (user_key) FROM events "
        f"WHERE true {users} {days} ORDER BY {order_by}) "
        f"TO '{target}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 122880)",
    )


def _run(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Execute a long statement; after two seconds, show on stderr how far it is."""
    with ThreadPoolExecutor(1) as pool, tqdm(total=100, desc="raw log", unit="%", delay=2) as bar:
        job = pool.submit(connection.execute, sql)
        while wait([job], timeout=0.25).not_done:
            bar.update(max(0, int(connection.query_progress()) - bar.n))
        job.result()
        bar.update(100 - bar.n)
