"""The user index on a CPU: built from Delta, asked for positions, and for users' newest tokens.

`make bench ONLY=fetch`: a lake of random events by Zipf-distributed users is made into an index,
once more with less memory than the index is large, and asked in batches. Each contestant is given
the same requests in the same run: the fetch as it is, the plain path (whose answers it must give,
bit for bit), gathering the same rows one by one, and copying as many bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import lakes
from benchmarks.fetch_gpu import check_same, row
from benchmarks.sizing import used
from downstream.user_index import IndexStore, UserIndex
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.tables import NUM_BUCKETS

BUILT, SEQUENCES, POSITIONS = 5e6, 200_000, 5e6
"""A second, at least: tokens into an index, sequences fetched, positions of sorted queries."""
SHARE = 0.5
"""Of the speed of copying memory, at least."""
MEMORY = 2.0
"""Times the bytes of a bucket's rows that building may take, at most."""
LIMITED = 0.4
"""Memory for building, page cache and all, as a share of the index's bytes."""
NUM_DAYS, NUM_USERS, LENGTH = 30, 100_000, 256


def s(do: Callable[[], Any], times: int = 7) -> float:
    """The best of some calls: whatever else a machine does only adds to them."""
    do()
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        do()
        best = min(best, time.perf_counter() - started)
    return best


def build(folder: Path, index: str) -> UserIndex:
    domain = load_domain(str(folder / "bench.toml"))
    return UserIndex.build(f"{folder}/lake", domain, folder / index, days=None, lines=[lakes.LINE])


def built(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of building: as fast as it goes, and with less memory than the index has bytes."""
    taken, index = [], None
    for _ in range(3):
        index = None  # its pages, or a virtual machine has to be given as many more
        shutil.rmtree(folder / "index", ignore_errors=True)
        with used() as of:
            index = build(folder, "index")
        taken.append(of)
    assert index is not None
    best = min(taken, key=lambda of: of.wall_s)
    num_bytes = sum(file.stat().st_size for file in (folder / "index").rglob("*.npy"))
    speed = len(index) / best.wall_s
    yield row("index built", speed / 1e6, "M tokens/s", "5 M", speed / BUILT, least=1.0)
    copied = s(lambda: rewrite(folder), 3)
    yield row(
        "index built", num_bytes / best.wall_s / 1e9, "GB/s", "writing its bytes to a file",
        copied / best.wall_s,
    )  # fmt: skip
    bucket = num_bytes / NUM_BUCKETS
    memory = max(of.more_memory for of in taken)
    yield row(
        "memory to build", memory / 1e6, "MB", "a bucket's bytes", memory / bucket, most=MEMORY
    )
    limit = int(LIMITED * num_bytes)
    with limited(limit) as group:
        if group is None:
            sys.stderr.write("no control group can be made here: less memory is left out\n")
            return
        worker = get_context("spawn").Process(target=build_in, args=(group, folder))
        started = time.perf_counter()
        worker.start()
        worker.join()
        wall_s = time.perf_counter() - started
    is_same = worker.exitcode == 0 and all(
        (folder / "less" / file.relative_to(folder / "index")).read_bytes() == file.read_bytes()
        for file in sorted((folder / "index").rglob("*.npy"))
    )
    if not is_same:
        raise ValueError(f"with {limit:,d} bytes the index is another one, or none")
    yield row(
        f"index built in {LIMITED} of its bytes", len(index) / wall_s / 1e6, "M tokens/s",
        "without a limit", wall_s / best.wall_s,
    )  # fmt: skip


def rewrite(folder: Path) -> None:
    """What the disk's cache takes: as many bytes as the index has, into a new file."""
    num_bytes = sum(file.stat().st_size for file in (folder / "index").rglob("*.npy"))
    block = np.ones(1 << 22, np.uint8)
    with (folder / "copy").open("wb", buffering=0) as file:
        for _ in range(num_bytes // len(block)):
            file.write(block.data)
    (folder / "copy").unlink()


@contextlib.contextmanager
def limited(num_bytes: int) -> Iterator[Path | None]:
    """A control group with so much memory; None where this user may make none."""
    for root, name in (
        ("/sys/fs/cgroup", "memory.max"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ):
        group = Path(root, f"iat-bench-{os.getpid()}")
        try:
            group.mkdir()
            (group / name).write_text(str(num_bytes))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield group
        finally:
            with contextlib.suppress(OSError):
                group.rmdir()
        return
    yield None


def build_in(group: Path, folder: Path) -> None:
    """In a process of its own."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    build(folder, "less")


def fetched(index: UserIndex, num_requests: int) -> Iterator[dict[str, Any]]:
    """The rows of asking."""
    store = IndexStore(index, lakes.LINE)
    draw = np.random.default_rng(1)
    times_us = np.array(index.arrays["event_time_us"][:: max(1, len(index) // 1000)])

    def asked(num: int) -> tuple[torch.Tensor, torch.Tensor]:
        user = lakes.spread(draw.zipf(lakes.ZIPF, num) % NUM_USERS)
        moment = draw.integers(times_us.min(), times_us.max(), num)
        order = np.lexsort((moment, user))
        return torch.from_numpy(user[order]), torch.from_numpy(moment[order])

    for num in (num_requests, 1_000_000):
        user, moment = asked(num)
        speed = num / s(lambda: store.positions(user, moment))  # noqa: B023
        slow = num / s(lambda: store.plain().positions(user, moment), 3)  # noqa: B023
        name = f"positions, {num:,d} sorted"
        yield row(name, speed / 1e6, "M/s", "5 M/s", speed / POSITIONS, least=1.0)
        yield row(name, speed / 1e6, "M/s", "plain path", speed / slow)

    user, moment = (x[torch.randperm(num_requests)] for x in asked(num_requests))
    out = store.fetch(user, moment, LENGTH)
    check_same(out, store.plain().fetch(user, moment, LENGTH))
    given = [out.token_BLD, out.mask_BL, out.token_mask_BL, out.gap_s_BL, out.row_BL]
    num_bytes = sum(x.nbytes for x in (*given, *out.side.values()))
    # Copied by both cores from and to memory that is there already: the most that there is.
    source, target = torch.ones(2, num_bytes, dtype=torch.uint8)
    place = out.row_BL.clamp(min=0).flatten()
    flat = out.token_BLD.flatten(0, 1)
    threads = torch.get_num_threads()
    name = f"fetch {num_requests} x {LENGTH}"
    copied = s(lambda: target.copy_(source))
    whole = s(lambda: store.fetch(user, moment, LENGTH, out))
    fresh = s(lambda: store.fetch(user, moment, LENGTH))
    slow = s(lambda: store.plain().fetch(user, moment, LENGTH), 2)
    tokens = s(lambda: torch.index_select(store.token_ND, 0, place, out=flat))
    torch.set_num_threads(1)
    alone = s(lambda: store.fetch(user, moment, LENGTH, out))
    torch.set_num_threads(threads)
    speed, filled = num_requests / whole, float(out.mask_BL.float().mean())
    sys.stderr.write(f"{filled:.0%} of the places hold an event; {threads} threads\n")
    yield row(name, speed / 1e3, "k seq/s", "200 k", speed / SEQUENCES, least=1.0)
    yield row(name, num_bytes / whole / 1e9, "GB/s", "memory copy", copied / whole, least=SHARE)
    yield row(name, num_bytes / whole / 1e9, "GB/s", "index_select of the tokens", tokens / whole)
    yield row(name, speed / 1e3, "k seq/s", "plain path", slow / whole)
    yield row(name, speed / 1e3, "k seq/s", "one thread", alone / whole)
    yield row(
        name + ", new memory", num_requests / fresh / 1e3, "k seq/s", "memory given", whole / fresh
    )


def run(folder: Path, num_events: int, num_requests: int) -> Iterator[dict[str, Any]]:
    """The rows of the benchmark."""
    make(folder, num_events)
    yield from built(folder)
    yield from fetched(UserIndex.open(folder / "index"), num_requests)


def make(folder: Path, num_events: int) -> Domain:
    return lakes.write(folder, num_events, num_days=NUM_DAYS, num_users=NUM_USERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000_000, help="in the index")
    parser.add_argument("--requests", type=int, default=4096, help="of a batch")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for found in run(Path(folder), args.events, args.requests):
            rows.append(found)
            missed = f"   MISSES {found['bar']}" if found["met"] is False else ""
            sys.stdout.write(
                f"{found['name']:32s} {found['value']:>9.3f} {found['unit']:10s} "
                f"{found['ratio']:>7.3f} x {found['against']}{missed}\n"
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
