"""Samples to batches on the device, with a ranker that does nothing, against the raw fetch.

`make bench ONLY=loader`, on a CUDA device where there is one. The log is random, its samples in a
Delta table that this writes, without Spark; histories and tokens are an index in memory (`iat
index` keeps one: `make bench ONLY=day_cost` has what that costs). The raw rate is
`IndexStore.fetch` of the same requests in the same batches; a batch holds more than that: ids of
every feature, match features, labels.

From Delta: the samples are read, laid out on the device with match features of the whole past, and
passed over once, or some times. On a CUDA device also how busy training of the default ranker
keeps it: the share of the time in which it had a step to run, and the share in which it ran
kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.loader_lake import DAY_US, END_DAY, SAMPLED_DAY, Log
from compressor.training.capture import Captured
from downstream.configs import RankerConfig, RankerTraining, arm
from downstream.data import RankerData
from downstream.loader import RankerLoader
from downstream.streaming import RankerTrainer, pieces_a_batch
from downstream.user_index import IN_MEMORY, IndexStore
from jobs import ledger
from pipelines import delta, tables
from pipelines.domain import load as load_domain

DAYS = range(SAMPLED_DAY, END_DAY)
LENGTH = 256
LEAST, BUSY = 0.5, 0.9
TURNS = 5
PASSES = (1, RankerTraining().epochs, 20)
STEPS, PROFILED = 1000, 50

Rows = Iterator[dict[str, Any]]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(do: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    do()
    wait(device)
    return time.perf_counter() - started


def consume(loader: RankerLoader) -> torch.Tensor:
    """What a ranker does that does nothing: count candidates, where the batch is."""
    total = torch.zeros((), dtype=torch.int64, device=loader.data.device)
    for batch in loader:
        total += batch.mask_RC.sum()
    return total


@dataclass(frozen=True, slots=True)
class Loaded:
    """The samples of the lake's table, on the device, and what that took."""

    data: RankerData
    read_s: float
    load_s: float

    @classmethod
    def of(cls, log: Log, lake: str, store: IndexStore) -> Loaded:
        begin = time.perf_counter()
        rows = delta.read(lake, tables.ranker_samples(log.domain))
        read_s = time.perf_counter() - begin
        data = RankerData.load(rows, log.domain, store)
        wait(store.device)
        return cls(data, read_s, time.perf_counter() - begin - read_s)


def passes(held: Loaded, config: RankerConfig, size: int) -> Rows:
    """The rates of raw fetch and loader, over the same requests."""
    data, store, device = held.data, held.data.store, held.data.device

    def loaded(**given: Any) -> RankerLoader:
        return RankerLoader(data, config, days=DAYS, pieces_a_batch=size, **given)

    loader = loaded()
    first_s = seconds(lambda: consume(loader), device)
    million, num = len(data) / 1e6, len(data.pieces.size)

    t = data.tensors
    pieces = [loader.pieces(0, number) for number in range(len(loader))]
    requests = [torch.from_numpy(data.pieces.request[p]).to(device) for p in pieces]
    asked = [(t.user_G[request_R], t.as_of_G[request_R]) for request_R in requests]

    def fetch() -> None:
        for user_R, as_of_R in asked:
            store.fetch(user_R, as_of_R, LENGTH)

    kinds: dict[str, Callable[[], Any]] = {"raw fetch": fetch, "loader": lambda: consume(loader)}
    if device.type == "cuda":
        captured = loaded(captured=True)
        kinds["loader, captured"] = lambda: consume(captured)
    # In turns, the first of which is not counted.
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(1 + TURNS):
        for kind, do in kinds.items():
            took[kind].append(seconds(do, device))
    each = {kind: statistics.median(found[1:]) for kind, found in took.items()}
    raw_s, best_s = each["raw fetch"], min(s for kind, s in each.items() if kind != "raw fetch")
    full = float(t.num_past_G.clamp(max=LENGTH).float().mean()) / LENGTH
    of = f"{size} x {LENGTH}"
    yield row(f"raw fetch {of}", num / raw_s, "req/s", f"histories {full:.0%} full", 1.0)
    for kind, s in each.items():
        if kind != "raw fetch":
            yield row(f"{kind} {of}", num / s, "req/s", "raw fetch", raw_s / s, least=LEAST)
    read_s, load_s = held.read_s, held.load_s
    yield row("read from Delta", read_s / million, "s/M rows", "raw fetch", raw_s / read_s)
    name = f"load, {len(store) / 1e6:.1f} M events"
    yield row(name, load_s / million, "s/M rows", "raw fetch", raw_s / load_s)
    for times in PASSES:
        whole_s = read_s + load_s + first_s + (times - 1) * best_s
        name = "from Delta, first pass" if times == 1 else f"from Delta, {times} passes"
        ratio = times * raw_s / whole_s
        yield row(name, times * num / whole_s, "req/s", "raw fetch", ratio, least=LEAST)
    # The number n for which n passes take twice as long as n of the raw fetch.
    more_s = read_s + load_s + first_s - best_s
    needed = max(1.0, more_s / (raw_s / LEAST - best_s)) if raw_s / LEAST > best_s else np.inf
    yield row(f"passes until {LEAST} of raw", needed, "passes", "one", needed)
    yield from checks(loaded)


def warm_up(log: Log, store: IndexStore, config: RankerConfig, size: int) -> None:
    """Kernels are compiled once a process: not in what is measured."""
    data = RankerData.load(log.samples(1000), log.domain, store)
    consume(RankerLoader(data, config, days=DAYS, pieces_a_batch=size))
    store.fetch(data.tensors.user_G, data.tensors.as_of_G, LENGTH)


def checks(loaded: Callable[..., RankerLoader]) -> Rows:
    """Whether order, resume and shards are as the loader's promises have them."""
    held = []
    one, other = loaded(seed=3), loaded(seed=3)
    order = np.concatenate([one.pieces(1, number) for number in range(len(one))])
    for number in {0, len(one) // 2, len(one) - 1}:
        one.load_state_dict({**one.state_dict(), "epoch": 1, "batch": number})
        state = one.state_dict()
        batch = next(iter(one))
        found = batch.sample_RC.clone(), batch.histories["main"].gap_s_RL.clone()
        other.load_state_dict(json.loads(json.dumps(state)))
        again = next(iter(other))
        held += [torch.equal(found[0], again.sample_RC)]
        held += [torch.equal(found[1], again.histories["main"].gap_s_RL)]
    for world in range(1, 6):
        ranks = [loaded(seed=3, rank=rank, world_size=world) for rank in range(world)]
        pieces = [r.pieces(1, number) for number in range(len(ranks[0])) for r in ranks]
        held += [np.array_equal(np.concatenate(pieces), order), len({len(r) for r in ranks}) == 1]
    held += [np.array_equal(np.sort(order), np.arange(len(order)))]
    name = "order, resume, shards hold"
    yield row(name, float(sum(held)), "checks", "all", sum(held) / len(held), least=1.0)


class Timed:
    """A captured step whose replays the device's own clock times."""

    def __init__(self, captured: Captured[None]) -> None:
        self.captured = captured
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def replay(self) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.captured.replay()
        end.record()
        self.events.append((begin, end))

    def ms(self) -> float:
        """Of all replays so far."""
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self.events)


def busy(data: RankerData, ranker: str, name: str) -> Rows:
    """How busy training keeps the device, with the default sizes of rankers and batches."""
    torch.set_float32_matmul_precision("high")  # as `iat train-ranker`
    training = RankerTraining()
    trainer = RankerTrainer.create(ranker, arm(name), training, data)
    size = pieces_a_batch(data, training)
    order = np.random.default_rng(0).permutation(len(data.pieces.size))
    groups = [order[start : start + size] for start in range(0, len(order), size)][:STEPS]

    def train(num: int) -> None:
        trainer.train_on(data, groups[:num], END_DAY * DAY_US, size)

    train(PROFILED)
    whole_s = statistics.median(seconds(lambda: train(STEPS), data.device) for _ in range(3))
    step = trainer._training_on(data, size)
    plain = step.captured
    timed = Timed(plain)
    step.captured = cast(Any, timed)
    timed_s = seconds(lambda: train(STEPS), data.device)
    step.captured = plain
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        train(PROFILED)
        torch.cuda.synchronize()
    kernels_s = kernel_seconds(profiled) / min(PROFILED, len(groups))
    of, per_step_ms = f"{ranker} {name} {size} x", whole_s / len(groups) * 1e3
    yield row(f"{of} step", per_step_ms, "ms", "its kernels", whole_s / len(groups) / kernels_s)
    share = timed.ms() / 1e3 / timed_s
    yield row(f"{of} has a step", 100 * share, "% of time", "wall", share, least=BUSY)
    share = kernels_s * len(groups) / whole_s
    yield row(f"{of} runs kernels", 100 * share, "% of time", "wall", share, least=BUSY)


def kernel_seconds(profiled: profile) -> float:
    """In which the device ran at least one kernel or copy."""
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiled.events() or []
        if event.device_type == DeviceType.CUDA
    )
    total_us, until = 0.0, 0.0
    for start, end in ranges:
        total_us += max(0.0, end - max(start, until))
        until = max(until, end)
    return total_us / 1e6


def row(
    name: str, value: float, unit: str, against: str, ratio: float, *, least: float | None = None
) -> dict[str, Any]:
    met = ratio >= least if least is not None else None
    return {
        "name": name, "value": value, "unit": unit, "against": against, "ratio": ratio,
        "bar": least, "met": met, "machine": ledger.machine(),
    }  # fmt: skip


def rows_of(args: argparse.Namespace, lake: str) -> Rows:
    domain = load_domain("synthetic")
    log = Log.of(domain, num_users=args.users, events_a_user=args.events)
    log.write(lake, args.samples)
    store = IndexStore(log.index(), IN_MEMORY, args.device)
    config = replace(arm("tokens"), history_length=LENGTH)
    warm_up(log, store, config, args.pieces)
    held = Loaded.of(log, lake, store)
    yield from passes(held, config, args.pieces)
    if store.device.type == "cuda":
        for name in ("base", "match"):
            yield from busy(held.data, "din", name)


def main() -> None:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_gpu else "cpu")
    parser.add_argument("--users", type=int, help="of the index")
    parser.add_argument("--events", type=int, default=500, help="of each user")
    parser.add_argument("--samples", type=int, help="in the table")
    parser.add_argument("--pieces", type=int, help="of a batch")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    is_large = args.device == "cuda"
    args.users = args.users or (20_000 if is_large else 2_000)
    args.samples = args.samples or (5_000_000 if is_large else 50_000)
    args.pieces = args.pieces or (4096 if is_large else 256)
    found = []
    with tempfile.TemporaryDirectory() as lake:
        for row in rows_of(args, lake):
            found.append(row)
            sys.stdout.write(
                f"{row['name']:28s} {row['value']:>13,.3f} {row['unit']:9s} {row['ratio']:>7.3f} x "
                f"{row['against']}{'   MISSES ' + str(row['bar']) if row['met'] is False else ''}\n"
            )
            sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
