"""A bar of Spark's tasks, with the time left, while Spark works for more than a few seconds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyspark.sql import SparkSession
from tqdm import tqdm

from jobs.spark_faults import SPARK_ERRORS

LOOK_S = 0.5
DELAY_S = 5
"""What is over sooner shows no bar."""
JOIN_S = 5
"""A look that hangs holds up no work."""


class TaskCount:
    """Tasks of all stages that have started since this was made."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker
        self._by_stage: dict[int, tuple[int, int]] = {}

    def look(self) -> tuple[int, int]:
        """(tasks done, tasks known); a stage that is gone is done."""
        running = {stage: self._tracker.getStageInfo(stage) for stage in self._running()}
        for stage, (_, num) in self._by_stage.items():
            if stage not in running:
                self._by_stage[stage] = (num, num)
        for stage, info in running.items():
            if info is not None:
                self._by_stage[stage] = (info.numCompletedTasks, info.numTasks)
        done, known = zip((0, 0), *self._by_stage.values(), strict=True)
        return sum(done), sum(known)

    def _running(self) -> list[int]:
        return list(self._tracker.getActiveStageIds())


@contextmanager
def task_bar(spark: SparkSession, doing: str) -> Iterator[None]:
    """Shows the tasks of whatever this session runs inside, once that takes more than DELAY_S."""
    count, over = TaskCount(spark.sparkContext.statusTracker()), threading.Event()
    with tqdm(total=0, desc=doing, unit="task", delay=DELAY_S) as bar:

        def watch() -> None:
            while not over.wait(LOOK_S):
                # A session that ends or is busy has nothing to show; its own error says why.
                with contextlib.suppress(*SPARK_ERRORS, OSError):
                    done, bar.total = count.look()
                    bar.update(done - bar.n)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join(JOIN_S)
            bar.total = bar.n = max(bar.n, bar.total)
