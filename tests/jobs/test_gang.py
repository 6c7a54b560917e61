"""Workers that die or fail: what they were at is done again, and no more often than it may be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.gang import MAX_TRIES, Gang, News, Runner, Task


def runner(folder: Path) -> Runner:
    """Leaves a line in a file for each try; some tasks fail, or end their process, the first
    time or always."""

    def run(task: Task) -> None:
        path = folder / task.name
        is_first = not path.exists()
        with path.open("a") as out:
            out.write(f"{os.getpid()}\n")
        if task.name == "ends once" and is_first:
            os._exit(7)
        if task.name == "fails" or (task.name == "fails once" and is_first):
            raise ValueError(task.name)

    return run


@pytest.mark.slow
def test_what_fails_or_ends_its_worker_is_tried_again(tmp_path: Path) -> None:
    names = ("fine", "ends once", "fails once", "fails")
    waiting = [Task("arm", name, 0) for name in names]
    gang = Gang(runner, (tmp_path,))
    news: list[News] = []
    try:
        gang.start(None, ("line",), 1)
        gang.start(None, ("arm",), 2)
        while waiting or gang.num_running:
            gang.give(waiting)
            news += gang.news(1.0, waiting)
        threads = [worker.threads for worker in gang.workers]
    finally:
        gang.end()
    error = {item.task.name: item.error for item in news}
    assert sorted(error) == sorted(names)
    assert [name for name in names if error[name]] == ["fails"]
    assert "ValueError: fails" in str(error["fails"])
    assert len((tmp_path / "fails").read_text().split()) == MAX_TRIES
    assert threads == [1, 1]
