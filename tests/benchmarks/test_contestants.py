"""Contestants answer the same question, and one that answers another is found out."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from pyspark.sql import SparkSession

from benchmarks import contestants
from benchmarks.contest import (
    duckdb_sql,
    ours,
    ours_written,
    padded,
    spark_asof,
    spark_rows,
    spark_window,
    worker,
    world,
)
from benchmarks.contest.world import Answer, Array, World
from benchmarks.contestants import OURS, Contest, Limit, Phase, Result

NUM_SAMPLES, FEW = 200, 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Ten users with as many events in an hour as make ties the rule."""
    found = world.write_world(tmp_path_factory.mktemp("contest") / "1", 1000, NUM_SAMPLES)
    ours.prepare(found, FEW)
    return found


def everyone() -> Array:
    return np.arange(NUM_SAMPLES)


def written(contestant: ModuleType, made: World, length: int, out: Path) -> Answer:
    """What a contestant writes, in Parquet."""
    contestant.ready(made, length)(out)
    return world.read_answer(out, everyone(), length)


@pytest.mark.parametrize("length", [1, FEW])
def test_ours_is_what_is_found_an_event_at_a_time(made: World, length: int) -> None:
    found = ours.checked(made, everyone(), length)
    assert found.differs(world.plain_answer(made, everyone(), length)) is None
    assert 0 < found.has_token.sum() < (found.event_time_us >= 0).sum() < found.f_a.size
    assert set(np.unique(found.label_buy)) == {0, 1, 2}


@pytest.mark.parametrize("length", [1, FEW])
@pytest.mark.parametrize("contestant", [ours_written, duckdb_sql])
def test_who_writes_an_answer_writes_ours(
    made: World, contestant: ModuleType, length: int, tmp_path: Path
) -> None:
    found = written(contestant, made, length, tmp_path / "out")
    assert found.differs(ours.checked(made, everyone(), length)) is None


@pytest.mark.parametrize("length", [1, FEW])
def test_the_padded_copy_holds_ours(made: World, length: int) -> None:
    padded.prepare(made, length)
    padded.ready(made, length)(made.folder)
    found = padded.checked(made, everyone(), length)
    contestants.remove(made.prepared("padded"))
    assert found.differs(ours.checked(made, everyone(), length)) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("contestant", "length"),
    [(spark_asof, 1), (spark_window, 1), (spark_window, FEW), (spark_rows, FEW)],
)
def test_spark_writes_ours(
    made: World, contestant: ModuleType, length: int, tmp_path: Path, spark: SparkSession
) -> None:
    found = written(contestant, made, length, tmp_path / "out")
    assert found.differs(ours.checked(made, everyone(), length)) is None


@pytest.mark.parametrize("length", [1, FEW])
def test_who_reads_the_same_instant_too_is_found_out(
    made: World, length: int, tmp_path: Path
) -> None:
    duckdb_sql.ready(made, length, later_than=">=")(tmp_path / "out")
    wrong = world.read_answer(tmp_path / "out", everyone(), length)
    said = wrong.differs(ours.checked(made, everyone(), length))
    assert said is not None
    assert said.startswith("event_time_us of ")


def test_a_label_or_a_token_too_early_is_found_out(made: World) -> None:
    right = ours.checked(made, everyone(), 1)
    for name in ("label_buy", "has_token", "token", "f_b"):
        wrong = ours.checked(made, everyone(), 1)
        column = getattr(wrong, name)
        column[7] = ~column[7]
        assert wrong.differs(right) == f"{name} of 1 of {NUM_SAMPLES} samples"


@pytest.mark.parametrize(
    ("limit", "said"), [(Limit(0.5, 1e12), "not in 0.5 s"), (Limit(60, 1e8), "not in 0.1 GB")]
)
def test_who_takes_too_much_is_ended_with_all_it_started(
    tmp_path: Path, limit: Limit, said: str
) -> None:
    asleep = "import subprocess; held = b'1' * 10**9; subprocess.run(['sleep', '61.3579'])"
    started = time.monotonic()
    found = contestants.measured([sys.executable, "-c", asleep], tmp_path, limit)
    assert found.failure == said
    assert time.monotonic() - started < 30
    assert not subprocess.run(["pgrep", "-f", "61.3579"], capture_output=True).stdout


def test_figures_of_who_answers_otherwise_do_not_count(made: World) -> None:
    held = Contest(made, Limit(60, 1e12))
    rival = contestants.CONTESTANTS[2]
    mine = Result(NUM_SAMPLES, Phase(2), Phase(1, anonymous=10), 5)
    slow = Result(NUM_SAMPLES, Phase(), Phase(2, anonymous=40), 50)
    wrong = Result(NUM_SAMPLES, Phase(), Phase(2), 50, "another answer: f_a of 1 of 2 samples")
    rows = contestants.rows_of([(held, 1, OURS, mine), (held, 1, rival, slow)])
    assert {row["name"].split(", newest")[0]: (row["ratio"], row["met"]) for row in rows} == {
        "speed": (2.0, True),
        "one pass, with preparation": (1.5, False),
        "memory to answer": (0.25, True),
        "memory, with preparation": (0.25, True),
        "written": (0.1, True),
    }
    assert len(list(contestants.lost(rows))) == 2
    rows = contestants.rows_of([(held, 1, OURS, mine), (held, 1, rival, wrong)])
    assert {row["ratio"] for row in rows} == {None}
    assert rows[0]["against"] == "padded copy: another answer: f_a of 1 of 2 samples"


def test_who_is_late_goes_on_in_a_smaller_world_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(command: Sequence[str], folder: Path, limit: Limit) -> Phase:
        """In this process; DuckDB is late in the whole world."""
        contestant, phase = command[3:5]
        if (contestant, phase, folder.name) == ("duckdb_sql", "answer", "1"):
            return Phase(failure="not in 1 s")
        worker.main(*command[3:])
        return Phase(2.0, 10, 20)

    monkeypatch.setattr(contestants, "measured", measured)
    names, limit = ["duckdb_sql", "ours_written"], Limit(1, 1e12)
    found = list(contestants.run(tmp_path, 3000, 300, 1.0, limit, names, [1]))
    assert [(held.num_samples, c.module, r.failure) for held, _, c, r in found] == [
        (300, "ours", ""),
        (300, "ours_written", ""),
        (300, "duckdb_sql", "not in 1 s"),
        (30, "ours", ""),
        (30, "duckdb_sql", ""),
    ]
    assert [r.speed for *_, r in found if not r.failure] == [150, 150, 15, 15]
    headings = [x.split("  ")[0] for x in contestants.table(found) if x.startswith("newest")]
    assert headings == [
        "newest 1 of 300 samples, 0.003 M events",
        "newest 1 of 30 samples, 0.0003 M events",
    ]
