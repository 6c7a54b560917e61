"""Workers that die or fail: what they were at is done again, and no more often than it may be."""

from __future__ import annotations

import os
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

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
    names = ("ends once", "fine", "fails once", "fails")
    gang = Gang(runner, (tmp_path,))
    news: list[News] = []
    try:
        gang.start(None, ("line",), 1)
        gang.start(None, ("arm",), 2)
        # What runs beside a death has lost a try by it: nothing does here.
        for together in (names[:1], names[1:]):
            waiting = [Task("arm", name, 0) for name in together]
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


def crowded(folder: Path) -> Runner:
    """Memory for two at once; who comes later fails."""

    def run(task: Task) -> None:
        mine = folder / f"{task.name}.{os.getpid()}.{threading.get_ident()}"
        mine.touch()
        try:
            if len(list(folder.glob("*.*"))) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            time.sleep(0.2)
        finally:
            mine.unlink()

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "threads"), [(4, 1), (1, 4)])
def test_where_memory_is_too_small_fewer_go_on(workers: int, threads: int, tmp_path: Path) -> None:
    waiting = [Task("arm", str(number), 0) for number in range(12)]
    gang = Gang(crowded, (tmp_path,))
    news: list[News] = []
    try:
        for _ in range(workers):
            gang.start(None, ("arm",), threads)
        while waiting or gang.num_running:
            gang.give(waiting)
            news += gang.news(1.0, waiting)
            for path in tmp_path.glob("*.*"):  # of a worker that was ended
                if not Path(f"/proc/{path.name.split('.')[1]}").exists():
                    path.unlink(missing_ok=True)
        left = [worker.threads for worker in gang.workers]
    finally:
        gang.end()
    assert sorted(int(item.task.name) for item in news) == list(range(12))
    assert [item.error for item in news] == [None] * 12
    assert 1 <= sum(left) < 4


def test_memory_too_small_for_one_alone_is_an_error(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"held.{os.getpid()}.{number}").touch()
    waiting = [Task("arm", "0", 0)]
    gang = Gang(crowded, (tmp_path,))
    news: list[News] = []
    try:
        gang.start(None, ("arm",), 1)
        while waiting or gang.num_running:
            gang.give(waiting)
            news += gang.news(1.0, waiting)
    finally:
        gang.end()
    assert "out of memory" in str(news[0].error)


def endless(folder: Path) -> Runner:
    (folder / str(os.getpid())).touch()

    def run(task: Task) -> None:
        time.sleep(600)

    return run


def hold(folder: Path) -> None:
    gang = Gang(endless, (folder,))
    gang.start(None, ("arm",), 1)
    gang.give([Task("arm", "0", 0)])
    time.sleep(600)


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = get_context("spawn").Process(target=hold, args=(tmp_path,))
    parent.start()
    until = time.monotonic() + 60
    while not (started := list(tmp_path.iterdir())) and time.monotonic() < until:
        time.sleep(0.1)
    (worker,) = started
    parent.kill()
    parent.join()
    while Path(f"/proc/{worker.name}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker.name}").exists()
