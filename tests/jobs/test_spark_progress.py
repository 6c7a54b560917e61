"""The bar of Spark's tasks: what it counts, and that it shows while Spark works."""

from __future__ import annotations

import time
from typing import NamedTuple

import pytest
from pyspark.sql import SparkSession

from jobs import spark_progress
from jobs.spark_progress import TaskCount, task_bar


class Info(NamedTuple):
    numCompletedTasks: int
    numTasks: int


class Tracker:
    """Stages as Spark's tracker tells of them."""

    def __init__(self) -> None:
        self.stages: dict[int, Info | None] = {}

    def getActiveStageIds(self) -> list[int]:  # noqa: N802
        return list(self.stages)

    def getStageInfo(self, stage: int) -> Info | None:  # noqa: N802
        return self.stages[stage]


def test_a_stage_that_is_gone_is_done() -> None:
    tracker = Tracker()
    count = TaskCount(tracker)
    assert count.look() == (0, 0)
    tracker.stages = {1: Info(2, 8), 2: Info(0, 4)}
    assert count.look() == (2, 12)
    tracker.stages = {2: Info(3, 4), 3: None}  # 3 has not told yet
    assert count.look() == (11, 12)
    tracker.stages = {3: Info(1, 5)}
    assert count.look() == (13, 17)


def test_tasks_are_shown_while_spark_works(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spark_progress, "DELAY_S", 0)
    monkeypatch.setattr(spark_progress, "LOOK_S", 0.02)

    def slow(value: int) -> int:
        time.sleep(0.2)
        return value

    with task_bar(spark, "views/shop"):
        assert spark.sparkContext.parallelize(range(8), 8).map(slow).sum() == 28
    shown = capsys.readouterr().err
    assert "views/shop" in shown
    assert "8/8" in shown


def test_an_error_of_the_work_passes_and_short_work_shows_nothing(
    spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ZeroDivisionError), task_bar(spark, "views/shop"):
        raise ZeroDivisionError
    assert "views/shop" not in capsys.readouterr().err
