"""How the cost of a fetch on the CPU grows: with its length, with the index, with threads.

`make bench ONLY=cost_curves`: indexes of made-up events in files, memory-mapped as a built one is,
up to half of this machine's memory and of its free disk (`--tokens 100000000` asks for more). Every
user has HISTORY events and is asked at a moment when all of the length is there, users and moments
at random: padding would cost nothing, and popular users would stay in caches. Bytes are those of
tokens alone; masks, gaps and three side columns come with them in the same time. Sequences are
fetched a million events at a time, 4096 sequences at most. Draws docs/cost_curves.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from benchmarks.fetch_gpu import WIDTH, row
from downstream.index_arrays import Array, ItemArrays, LineArrays
from downstream.user_index import IN_MEMORY, IndexStore, UserIndex

mpl.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "cost_curves.png"
LENGTHS = (16, 64, 256, 1024, 4096)
TOKENS = (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000)
USUAL_LENGTH, USUAL_TOKENS = 256, 10_000_000
HISTORY = 8192
EVENTS_AT_ONCE, MOST_SEQUENCES = 1 << 20, 4096
SECONDS = 2.0
"""For each point, at least three batches."""
SECOND_US = 1_000_000
BLOCK = 1 << 17
COLUMNS: dict[str, Any] = {
    "event_time_us": np.int64, "f_a": np.int32, "f_b": np.int32, "label_buy": np.int8,
    "label_time_us_buy": np.int64, "available_us": np.int64, "token": np.float16,
}  # fmt: skip
EVENT_BYTES = 100 + 2 * WIDTH
"""Of files, and of what an index adds to them in memory."""

Point = tuple[float, float]
"""Sequences and GB of tokens a second."""


def write_events(folder: Path, num: int, draw: np.random.Generator) -> None:
    """One file a column; tokens repeat after a block, which no fetch can tell."""
    folder.mkdir()
    token = draw.standard_normal((BLOCK, WIDTH), dtype=np.float32).astype(np.float16)
    for name, dtype in COLUMNS.items():
        shape = (num, WIDTH) if name == "token" else (num,)
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        for at in range(0, num, BLOCK):
            place = np.arange(at, min(at + BLOCK, num))
            time_us = place % HISTORY * SECOND_US
            if name == "token":
                array[place[0] : place[-1] + 1] = token[: len(place)]
            elif "_us" in name:
                # A label and a token are known ten seconds later.
                array[place] = time_us + (0 if name == "event_time_us" else 10 * SECOND_US)
            else:
                array[place] = draw.integers(0, 2, len(place))


def opened(folder: Path) -> IndexStore:
    """The store over a folder's files, none of whose tokens is in memory yet."""
    held: dict[str, Array] = {}
    for name in COLUMNS:
        with (folder / f"{name}.npy").open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        held[name] = np.load(folder / f"{name}.npy", mmap_mode="c")
    num = len(held["token"])
    index = UserIndex.from_arrays(
        user_id=np.arange(num) // HISTORY,
        event_time_us=held["event_time_us"],
        item_id=np.zeros(num, np.int64),
        side={name: held[name] for name in ("f_a", "f_b")},
        labels={"buy": (held["label_buy"], held["label_time_us_buy"])},
        tokens=LineArrays(held["token"], held["available_us"], ItemArrays.none(WIDTH)),
    )
    return IndexStore(index, IN_MEMORY)


def requests(
    store: IndexStore, length: int, draw: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of users and moments."""
    num = min(MOST_SEQUENCES, EVENTS_AT_ONCE // length)
    user = draw.integers(0, len(store) // HISTORY, num)
    as_of_us = draw.integers(length, HISTORY + 1, num) * SECOND_US
    return torch.from_numpy(user), torch.from_numpy(as_of_us)


def measured(store: IndexStore, length: int, *, is_first: bool = False) -> Point:
    """The median of some batches after one more; or the very first one."""
    draw, took = np.random.default_rng(length), list[float]()
    # Written over by each batch, as a training loop would have it.
    held = None if is_first else store.fetch(*requests(store, length, draw), length)
    while not took or (not is_first and (len(took) < 3 or sum(took) < SECONDS)):
        user, as_of_us = requests(store, length, draw)
        started = time.perf_counter()
        store.fetch(user, as_of_us, length, held)
        took.append(time.perf_counter() - started)
    a_second = len(user) / statistics.median(took)
    return a_second, a_second * length * 2 * WIDTH / 1e9


def copied(length: int) -> float:
    """GB a second that this machine copies of as many tokens."""
    num = min(MOST_SEQUENCES, EVENTS_AT_ONCE // length) * length
    token = torch.zeros(num, WIDTH, dtype=torch.float16)
    out, took = torch.empty_like(token), list[float]()
    for _ in range(10):
        started = time.perf_counter()
        out.copy_(token)
        took.append(time.perf_counter() - started)
    return num * 2 * WIDTH / 1e9 / statistics.median(took)


def touch(store: IndexStore) -> None:
    """Reads every token once, so that the page cache holds what it can."""
    for part in store.token_ND.split(BLOCK):
        part.view(torch.int16).sum()


def run(folder: Path, sizes: Sequence[int], lengths: Sequence[int]) -> dict[str, dict[int, Point]]:
    """Points of each curve by its name and what it is over."""
    draw, curves = np.random.default_rng(0), dict[str, dict[int, Point]]()
    num_cores = len(os.sched_getaffinity(0))
    usual = max(size for size in sizes if size <= max(USUAL_TOKENS, min(sizes)))
    for size in sizes:
        place = folder / f"{size}"
        write_events(place, size, draw)
        store = opened(place)
        first = measured(store, USUAL_LENGTH, is_first=True)
        curves.setdefault("tokens, the first batch, from disk", {})[size] = first
        touch(store)
        curves.setdefault("tokens", {})[size] = measured(store, USUAL_LENGTH)
        if size == usual:
            curves["length"] = {length: measured(store, length) for length in lengths}
            curves["copy"] = {length: (0.0, copied(length)) for length in lengths}
            for threads in range(1, num_cores + 1):
                torch.set_num_threads(threads)
                curves.setdefault("threads", {})[threads] = measured(store, USUAL_LENGTH)
        del store
        shutil.rmtree(place)
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {size:,} tokens\n")
    return curves


def rows_of(curves: dict[str, dict[int, Point]]) -> Iterator[dict[str, Any]]:
    """Each point: by length against a copy of the tokens, else against the first of its curve."""
    for length, (sequences, speed) in curves["length"].items():
        name, copy = f"fetch of {length}", curves["copy"][length][1]
        yield row(name, sequences, "sequences/s", "copy of the tokens", speed / copy)
        yield row(name, speed, "GB/s", "copy of the tokens", speed / copy)
    for curve in ("tokens", "tokens, the first batch, from disk", "threads"):
        points = curves[curve]
        least = min(points)
        for at, (sequences, speed) in points.items():
            name, against = f"fetch of {USUAL_LENGTH}, {curve}: {at:,}", f"{curve}: {least:,}"
            yield row(name, sequences, "sequences/s", against, sequences / points[least][0])
            yield row(name, speed, "GB/s", against, sequences / points[least][0])


def draw_picture(curves: dict[str, dict[int, Point]], place: Path) -> None:
    """Three panels: over length, over tokens in the index, over threads."""
    figure, (by_length, by_tokens, by_threads) = plt.subplots(
        1, 3, figsize=(13.5, 3.9), layout="constrained"
    )
    lengths = curves["length"]
    speeds = [speed for _, speed in lengths.values()]
    by_length.loglog(list(lengths), [n for n, _ in lengths.values()], "o-", color="C0")
    by_length.set(xlabel="length, events", ylabel="sequences a second", title="length")
    by_length.yaxis.label.set_color("C0")
    right = by_length.twinx()
    right.semilogx(list(lengths), speeds, "s--", color="C1", label="fetch")
    copies = [speed for _, speed in curves["copy"].values()]
    right.semilogx(list(lengths), copies, ":", color="C7", label="copy of the tokens")
    right.set_ylim(0)
    right.set_ylabel("GB of tokens a second", color="C1")
    right.legend(loc="center right", fontsize="small")
    by_length.set_xticks(list(lengths), [f"{n}" for n in lengths])
    by_length.minorticks_off()
    for curve, style in (("tokens", "o-"), ("tokens, the first batch, from disk", "s--")):
        points = curves[curve]
        name = "from memory" if curve == "tokens" else "the first batch, from disk"
        at = [n / 1e6 for n in points]
        by_tokens.semilogx(at, [n for n, _ in points.values()], style, label=name)
    by_tokens.set_xticks(at, [f"{n:g}" for n in at])
    by_tokens.minorticks_off()
    by_tokens.legend(fontsize="small")
    by_tokens.set(xlabel=f"tokens in the index, million ({2 * WIDTH} bytes each)")
    threads = curves["threads"]
    by_threads.plot(list(threads), [n for n, _ in threads.values()], "o-")
    by_threads.set_xticks(list(threads))
    by_threads.set(xlabel="threads")
    scale = USUAL_LENGTH * 2 * WIDTH / 1e9
    for panel, title in ((by_tokens, "index"), (by_threads, "threads")):
        panel.set(title=f"{title}, length {USUAL_LENGTH}", ylabel="sequences a second")
        panel.set_ylim(0)
        gb = panel.secondary_yaxis("right", functions=(_times(scale), _times(1 / scale)))
        gb.set_ylabel("GB of tokens a second")
    for panel in (by_length, by_tokens, by_threads):
        panel.grid(alpha=0.3)
    figure.savefig(place, dpi=90)


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: value * factor


def most_tokens(folder: Path) -> int:
    """As many as take half of this machine's memory, and of its free disk, at most."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(memory, shutil.disk_usage(folder).free) // 2 // EVENT_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, help="in the largest index (default: what fits)")
    parser.add_argument("--folder", type=Path, help="where indexes are made (a temporary one)")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        most = args.tokens or most_tokens(Path(folder))
        sizes = [size for size in TOKENS if size <= most]
        if not sizes:
            parser.error(f"--tokens must be at least {TOKENS[0]}, and {most} is what is asked for")
        curves = run(Path(folder), sizes, LENGTHS)
    rows = list(rows_of(curves))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    draw_picture(curves, args.picture)
    for line in rows:
        sys.stdout.write(
            f"{line['name']:62s} {line['value']:>12,.2f} {line['unit']:12s}"
            f"{line['ratio']:>7.3f} x {line['against']}\n"
        )


if __name__ == "__main__":
    main()
