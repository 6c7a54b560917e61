"""A fetch on a GPU: users' newest tokens, with what is beside them, against the device's own copy.

`make bench ONLY=fetch_gpu` on a machine with a CUDA device: an index of random users, Zipf
distributed, resident on it. Each contestant is given the same requests in the same run: the
kernels of `downstream/gather.py`, the plain path (whose answers theirs must be, bit for bit),
`index_select` of the tokens alone, and a copy of as many bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from downstream import gather
from downstream.index_arrays import ItemArrays, LineArrays
from downstream.token_store import Tokens
from downstream.user_index import IN_MEMORY, IndexStore, UserIndex
from jobs import ledger
from pipelines.features import NEVER_US

DAY_US = 86_400_000_000
NUM_DAYS, NUM_USERS, WIDTH, ZIPF = 365, 100_000, 64, 1.2
BARS = {256: 0.6, 1024: 0.8}
"""By length: the share of a copy's speed that gathering tokens must reach."""
MOST_MS = 0.3
"""For a whole fetch of the first length."""


def random_index(num_events: int, draw: np.random.Generator) -> UserIndex:
    """One in ten events has no token yet."""
    user = np.sort(draw.zipf(ZIPF, num_events) % NUM_USERS)
    time_us = draw.integers(0, NUM_DAYS * DAY_US, num_events)
    time_us = time_us[np.lexsort((time_us, user))]
    token = draw.standard_normal((num_events, WIDTH), dtype=np.float32).astype(np.float16)
    available_us = np.where(draw.random(num_events) < 0.9, time_us + 1000, NEVER_US)
    return UserIndex.from_arrays(
        user_id=user,
        event_time_us=time_us,
        item_id=draw.integers(0, 10_000, num_events),
        side={f"f_{name}": draw.integers(0, 99, num_events) for name in "ab"},
        labels={"buy": (draw.integers(-1, 2, num_events), time_us + 5)},
        tokens=LineArrays(token, available_us, ItemArrays.none(WIDTH)),
    )


def ms(do: Callable[[], Any], times: int = 50) -> float:
    """Of one call, in a row of them, as the device's own clock has it."""
    for _ in range(5):
        do()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        do()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def check_same(found: Tokens, expected: Tokens) -> None:
    """ValueError where they are not the same bits."""
    pairs = {name: (getattr(found, name), getattr(expected, name)) for name in Tokens._fields}
    ours, theirs = pairs.pop("side")
    pairs |= {name: (ours[name], theirs[name]) for name in theirs}
    for name, (mine, other) in pairs.items():
        if mine.dtype != other.dtype or not torch.equal(mine, other):
            raise ValueError(f"{name} of the kernels is not the plain path's")


def run(num_events: int, num_requests: int) -> list[dict[str, Any]]:
    """The rows of the benchmark."""
    draw = np.random.default_rng(0)
    store = IndexStore(random_index(num_events, draw), IN_MEMORY, "cuda")
    plain = store.plain()
    user = torch.from_numpy(draw.zipf(ZIPF, num_requests) % NUM_USERS).cuda()
    as_of_us = torch.from_numpy(
        draw.integers(NUM_DAYS // 4 * DAY_US, NUM_DAYS * DAY_US, num_requests)
    ).cuda()
    rows: list[dict[str, Any]] = []

    def add(name: str, value: float, unit: str, against: str, ratio: float, **bar: Any) -> None:
        rows.append(
            {"name": name, "value": value, "unit": unit, "against": against, "ratio": ratio}
            | {"bar": None, "met": None}
            | bar
            | {"machine": ledger.machine()}
        )

    for length, bar in BARS.items():
        fetched = store.fetch(user, as_of_us, length)
        check_same(fetched, plain.fetch(user, as_of_us, length))
        # Whole sequences, so that every byte is read: padding would cost nothing.
        first_B1 = torch.randint(num_events - length, (num_requests, 1), device="cuda")
        row_BL = first_B1 + torch.arange(length, device="cuda")
        all_BL, never_B = torch.ones_like(row_BL, dtype=torch.bool), as_of_us * 0 + NEVER_US + 1
        token_ND, available_us_N = store.token_ND, store.available_us_N
        out_BLD, source_BLD = torch.empty_like(fetched.token_BLD), fetched.token_BLD
        copied = ms(lambda: out_BLD.copy_(source_BLD))  # noqa: B023
        gathered = ms(
            lambda: gather.tokens_at(token_ND, available_us_N, row_BL, all_BL, never_B)  # noqa: B023
        )
        selected = ms(lambda: token_ND.index_select(0, row_BL.flatten()))  # noqa: B023
        whole = ms(lambda: store.fetch(user, as_of_us, length))  # noqa: B023
        slow = ms(lambda: plain.fetch(user, as_of_us, length))  # noqa: B023
        gigabytes = 2 * out_BLD.numel() * out_BLD.element_size() / 1e9
        of = f"{num_requests} x {length}"
        speed = gigabytes / gathered * 1e3
        share = copied / gathered
        add(f"gather {of}", speed, "GB/s", "device copy", share, bar=bar, met=share >= bar)
        add(f"gather {of}", speed, "GB/s", "index_select", selected / gathered)
        add(f"fetch {of}", whole, "ms", "plain path", whole / slow)
        if length == min(BARS):
            is_met = whole <= MOST_MS
            add(f"fetch {of}", whole, "ms", f"{MOST_MS} ms", whole / MOST_MS, bar=1.0, met=is_met)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000_000, help="in the index")
    parser.add_argument("--requests", type=int, default=4096, help="of a batch")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device, and PyTorch sees none")
    rows = run(args.events, args.requests)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        sys.stdout.write(
            f"{row['name']:22s} {row['value']:>9.3f} {row['unit']:5s} {row['ratio']:>7.3f} x "
            f"{row['against']}{'   MISSES ' + str(row['bar']) if row['met'] is False else ''}\n"
        )


if __name__ == "__main__":
    main()
