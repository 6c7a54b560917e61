"""DuckDB: an ASOF JOIN for the newest event; for more, the rows before it, by their number.

The file's rows are in order of (user, event_time, instance_id), so the newest K are the K rows that
end where the ASOF JOIN points: numbers that are unnested, joined, and gathered into lists. Events
of the same instant are one row of that join, which keeps the last; among equal times ASOF JOIN
itself takes any. A lateral join with LIMIT, or a slice of a list of each user's events, reads or
copies a user's whole past for each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb

from benchmarks.contest.world import World

VALUES = """
    CASE WHEN label_time_buy < as_of AND label_buy IS NOT NULL THEN label_buy + 1 ELSE 0 END
        AS label_buy,
    CASE WHEN available_time < as_of THEN token END AS token
"""


def ready(world: World, length: int, later_than: str = ">") -> Callable[[Path], None]:
    """`later_than`: how as_of compares with event_time; another operator answers wrongly."""
    events = f"read_parquet('{world.events}', file_row_number = true)"
    samples = f"read_parquet('{world.samples}')"
    moments = f"""
        SELECT user_id, event_time, max(file_row_number) AS last
        FROM {events} GROUP BY user_id, event_time
    """
    placed = f"""
        SELECT sample_id, s.user_id, as_of, last FROM {samples} s
        ASOF JOIN ({moments}) m ON s.user_id = m.user_id AND s.as_of {later_than} m.event_time
    """
    if length == 1:
        found = f"""
            SELECT sample_id, event_time, f_a, f_b, {VALUES}
            FROM ({placed}) p JOIN {events} e ON e.file_row_number = p.last
        """
    else:
        lists = ", ".join(
            f"list({name} ORDER BY file_row_number) AS {name}"
            for name in ("event_time", "f_a", "f_b", "label_buy", "token")
        )
        found = f"""
            WITH placed AS ({placed}),
            first AS (SELECT user_id, min(file_row_number) AS first FROM {events} GROUP BY user_id),
            wanted AS (
                SELECT sample_id, as_of,
                    unnest(range(greatest(first, last + 1 - {length}), last + 1)) AS file_row_number
                FROM placed JOIN first USING (user_id)
            ),
            rows AS (
                SELECT sample_id, file_row_number, event_time, f_a, f_b, {VALUES}
                FROM wanted JOIN {events} USING (file_row_number)
            )
            SELECT sample_id, {lists} FROM rows GROUP BY sample_id
        """
    connection = duckdb.connect()
    connection.execute(f"SET temp_directory = '{world.folder / 'duckdb'}'")

    def answer(out: Path) -> None:
        connection.execute(f"COPY ({found}) TO '{out}' (FORMAT parquet, COMPRESSION lz4)")

    return answer
