"""Processes that run commands of the toolkit, kept warm: a kill costs a start, a command does not.

`python -m tests.faults.workers KIND LOG` is one of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from queue import Empty, Queue
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
Kind = Literal["spark", "torch"]
START_S = 240.0


class Worker:
    """A process that runs commands as `iat` would and says their exit codes."""

    def __init__(self, kind: Kind, *, plant: str = "", skew_s: int = 0) -> None:
        self.kind: Kind = kind
        self.is_ready = False
        descriptor, name = tempfile.mkstemp(prefix="iat-fault-", suffix=".log")
        os.close(descriptor)
        self.log = Path(name)
        env = os.environ | {"OMP_NUM_THREADS": "1", "IAT_PLANT": plant}
        env.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.workers", kind, name],
            cwd=ROOT, env=env | (_clock_off_by(skew_s) if skew_s else {}),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.said: Queue[str] = Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.put(line)

    def wait_ready(self) -> None:
        if not self.is_ready and self.code(START_S) != 0:
            raise RuntimeError(f"a {self.kind} worker does not start:\n{self.tail()}")
        self.is_ready = True

    def give(self, argv: list[str]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(argv) + "\n")
        self.process.stdin.flush()

    def code(self, timeout_s: float) -> int | None:
        """The exit code of what was given; None if it is not done by then."""
        try:
            return int(self.said.get(timeout=timeout_s))
        except Empty:
            return None

    def kill(self, *, alone: bool = False) -> None:
        """SIGKILL to the whole session, or to Python alone: Java then ends when it notices, and may
        still finish what it was doing."""
        with contextlib.suppress(ProcessLookupError):
            if alone:
                self.process.kill()
            else:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


class Pool:
    """Workers of both kinds, some always starting, so that one is ready when it is asked for."""

    def __init__(self, plant: str = "", spare: int = 2) -> None:
        self.plant, self.spare = plant, spare
        self.waiting: dict[Kind, list[Worker]] = {"spark": [], "torch": []}
        self.every: list[Worker] = []
        self.lock = threading.RLock()
        """Schedules that run at once share the pool."""

    def take(self, kind: Kind, *, skew_s: int = 0) -> Worker:
        """`skew_s`: of its clock, for a worker that nobody else gets."""
        with self.lock:
            if skew_s:
                worker = self._start(kind, skew_s)
            else:
                self.prepare(kind)
                worker = self.waiting[kind].pop(0)
        worker.wait_ready()
        return worker

    def prepare(self, kind: Kind) -> None:
        with self.lock:
            while len(self.waiting[kind]) < self.spare:
                self.waiting[kind].append(self._start(kind))

    def give_back(self, worker: Worker) -> None:
        """One that was killed is replaced."""
        with self.lock:
            if worker.process.poll() is None:
                self.waiting[worker.kind].insert(0, worker)
            self.prepare(worker.kind)

    def drop(self, worker: Worker) -> None:
        worker.kill()
        worker.log.unlink(missing_ok=True)
        with self.lock:
            self.every.remove(worker)

    def end(self) -> None:
        for worker in list(self.every):
            self.drop(worker)

    def _start(self, kind: Kind, skew_s: int = 0) -> Worker:
        worker = Worker(kind, plant=self.plant, skew_s=skew_s)
        self.every.append(worker)
        return worker


def _clock_off_by(skew_s: int) -> dict[str, str]:
    """Python's clock and Java's, with timeouts left as they are."""
    import libfaketime

    library = Path(libfaketime.__file__).parent / "vendor/libfaketime/src/libfaketime.so.1"
    if not library.exists():
        raise RuntimeError(f"no {library}: clocks are skewed with libfaketime on Linux alone")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"{skew_s:+d}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        # Where glibc is new the fix is wrong for Java, which then waits without a pause.
        "FAKETIME_FORCE_MONOTONIC_FIX": "0",
    }


def serve(kind: str, log: str) -> None:
    """Ready a session or the imports, then run what comes in until there is no more."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    with Path(log).open("a") as file:
        for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
            os.dup2(file.fileno(), descriptor)
    from jobs import cli
    from tests.faults import plants

    if kind == "spark":
        from jobs.spark import session

        session("local[2]", memory="1g")
    else:
        import torch

        import jobs.train_compressor  # noqa: F401

        torch.set_num_threads(1)
    plants.plant(os.environ.get("IAT_PLANT", ""))
    print(0, file=replies, flush=True)
    for line in sys.stdin:
        try:
            code = cli.run(json.loads(line))
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        print(code, file=replies, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
