"""Worker processes that take tasks: several threads each, on the GPUs there are or on the CPU.

A worker that dies, as one does whose GPU reports an error, is started again with half the threads,
and what it was at is done again by whoever is free. Where a GPU's memory is too small for all that
work on it, one of them is given up, or half of its threads, and the others go on.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

import torch

from jobs.parent import end_with_parent

log = logging.getLogger(__name__)

MAX_RESTARTS = 4
"""Of the workers of one gang together."""
MAX_TRIES = 3
"""Of one task."""
NO_MEMORY = "torch.OutOfMemoryError"
BROKEN_GPU = 3
"""Exit code of a worker whose GPU does nothing any more for this process."""

Runner = Callable[["Task"], None]


class Task(NamedTuple):
    """A line or an arm with one seed."""

    kind: str
    name: str
    seed: int


class News(NamedTuple):
    """A task that is over: done, or failed as often as it may be tried."""

    task: Task
    error: str | None


@dataclass
class Worker:
    """A process, the kinds of task it takes, and those it is at."""

    process: SpawnProcess
    receiver: Connection
    tasks: Any
    gpu: str | None
    kinds: tuple[str, ...]
    threads: int
    running: list[Task] = field(default_factory=list)


class Gang:
    """The workers of a run, ended with it.

    `make_runner(*given)` is called once in each process; what it returns is called with tasks, in
    several threads at once.
    """

    def __init__(self, make_runner: Callable[..., Runner], given: tuple[Any, ...]) -> None:
        self._context = get_context("spawn")
        self._make_runner, self._given = make_runner, given
        self._tries: dict[Task, int] = {}
        self._num_restarts = 0
        self.workers: list[Worker] = []

    def start(self, gpu: str | None, kinds: tuple[str, ...], threads: int) -> None:
        """One more process, for these kinds of task, so many of them at a time."""
        receiver, sender = self._context.Pipe(duplex=False)
        tasks = self._context.SimpleQueue()
        process = self._context.Process(
            target=_work,
            args=(self._make_runner, self._given, gpu, threads, tasks, sender),
            daemon=True,
        )
        process.start()
        # The worker's end is its own alone, so that its death ends the pipe.
        sender.close()
        self.workers.append(Worker(process, receiver, tasks, gpu, kinds, threads))

    @property
    def num_running(self) -> int:
        return sum(len(worker.running) for worker in self.workers)

    def give(self, waiting: list[Task]) -> None:
        """Hand out what there is room for, in order, and take it off the list."""
        for task in list(waiting):
            room = [
                (worker.threads - len(worker.running), -place)
                for place, worker in enumerate(self.workers)
                if task.kind in worker.kinds
            ]
            free, place = max(room, default=(0, 0))
            if free > 0:
                worker = self.workers[-place]
                worker.running.append(task)
                worker.tasks.put(task)
                waiting.remove(task)

    def news(self, timeout_s: float, waiting: list[Task]) -> list[News]:
        """What is over since the last call, or within so many seconds. What is to be tried again
        joins `waiting`."""
        found = []
        by_receiver = {worker.receiver: worker for worker in self.workers}
        for receiver in wait(list(by_receiver), timeout_s):
            worker = by_receiver[receiver]  # type: ignore[index]
            if worker not in self.workers:  # given up a moment ago
                continue
            try:
                task, error = worker.receiver.recv()
            except (EOFError, OSError):
                over = self._replace(worker)
            else:
                worker.running.remove(task)
                over = [News(task, error)]
                if error and NO_MEMORY in error and self._make_room(worker, waiting):
                    waiting.insert(0, task)
                    continue
            for item in over:
                tries = self._tries[item.task] = self._tries.get(item.task, 0) + 1
                if item.error is None or tries >= MAX_TRIES:
                    found.append(item)
                else:
                    log.warning("%s is tried again: %s", item.task, item.error.splitlines()[-1])
                    waiting.insert(0, item.task)
        return found

    def _make_room(self, worker: Worker, waiting: list[Task]) -> bool:
        """Give up a worker of this one's GPU, itself if others take its kinds of task, or half of
        its threads; False if nothing is left to give up."""
        beside = [other for other in self.workers if other.gpu == worker.gpu]
        spare = [w for w in beside if sum(w.kinds == other.kinds for other in beside) > 1]
        shared = [w for w in beside if w.threads > 1]
        found = [w for w in (*spare, *shared) if w is worker] or spare or shared
        if not found:
            return False
        given_up = found[0]
        given_up.process.terminate()
        given_up.process.join()
        self.workers.remove(given_up)
        waiting[:0] = given_up.running
        log.warning("GPU %s has too little memory: fewer at once", given_up.gpu)
        if given_up not in spare:
            self.start(given_up.gpu, given_up.kinds, given_up.threads // 2)
        return True

    def _replace(self, worker: Worker) -> list[News]:
        worker.process.join()
        self.workers.remove(worker)
        code = worker.process.exitcode
        self._num_restarts += 1
        if self._num_restarts > MAX_RESTARTS:
            raise RuntimeError(
                f"workers ended {self._num_restarts} times, the last with exit code {code} (see "
                "the log); what is finished is kept, start the run again to go on"
            )
        threads = max(1, worker.threads // 2)
        log.warning("a worker ended with exit code %s; another starts, %d at once", code, threads)
        self.start(worker.gpu, worker.kinds, threads)
        return [News(task, f"its worker ended with exit code {code}") for task in worker.running]

    def end(self) -> None:
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join()


def _work(
    make_runner: Callable[..., Runner],
    given: tuple[Any, ...],
    gpu: str | None,
    threads: int,
    tasks: Any,
    sender: Connection,
) -> None:
    """A worker process: threads that take tasks as long as it lives."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    end_with_parent()
    run, sending = make_runner(*given), threading.Lock()

    def take() -> None:
        with _own_stream(on_gpu=gpu is not None):
            while True:
                task, error = tasks.get(), None
                try:
                    run(task)
                except Exception as caught:
                    error = traceback.format_exc()
                    if "CUDA error" in str(caught):
                        # Every later call of this process would fail with the same.
                        log.error("%s: %s", task, error)
                        os._exit(BROKEN_GPU)
                with sending:
                    sender.send((task, error))

    takers = [threading.Thread(target=take, daemon=True) for _ in range(threads)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()


@contextmanager
def _own_stream(*, on_gpu: bool) -> Iterator[None]:
    """On a GPU, work of this thread that overlaps that of the others."""
    if not on_gpu:
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


def gpus(device: str) -> list[str | None]:
    """The GPUs to share the work, as CUDA_VISIBLE_DEVICES names them; of a CPU one that is none."""
    if not device.startswith("cuda"):
        return [None]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]
    return [*names]
