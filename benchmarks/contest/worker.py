"""One phase of one contestant, in the process that runs this: says on its last line what it took.

`python -m benchmarks.contest.worker CONTESTANT prepare|answer|check FOLDER LENGTH OUT TIMES`.
Seconds are of the work alone: a session that starts, a connection or an index that is opened are
not in them. An answer that is quick is given again, up to TIMES: its seconds are the median.
"""

from __future__ import annotations

import importlib
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.contest.world import World, rows_of

QUICK_S = 6.0


def main(contestant: str, phase: str, folder: str, length: str, out: str, times: str) -> None:
    module = importlib.import_module(f"benchmarks.contest.{contestant}")
    world, place = World(Path(folder)), Path(out)
    if phase == "check":
        sample_id = np.load(place.with_name("checked.npy"))
        pq.write_table(rows_of(sample_id, module.checked(world, sample_id, int(length))), place)
        return
    if phase == "prepare":
        took = [timed(lambda: module.prepare(world, int(length)))]
    else:
        answer = module.ready(world, int(length))
        took = [timed(lambda: answer(place))]
        while sum(took) < QUICK_S and len(took) < int(times):
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
            took.append(timed(lambda: answer(place)))
    sys.stdout.write(f"{statistics.median(took):.6f}\n")


def timed(work: Callable[[], None]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(*sys.argv[1:])
