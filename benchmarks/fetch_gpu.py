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
from collections.abc import Callable, Iterator
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
    user = torch.from_numpy(draw.zipf(ZIPF, num_requests) % NUM_USERS).cuda()
    as_of_us = torch.from_numpy(
        draw.integers(NUM_DAYS // 4 * DAY_US, NUM_DAYS * DAY_US, num_requests)
    ).cuda()
    return [row for length in BARS for row in rows_of(store, user, as_of_us, length)]


def rows_of(
    store: IndexStore, user: torch.Tensor, as_of_us: torch.Tensor, length: int
) -> Iterator[dict[str, Any]]:
    """The rows of one length, once the kernels' answer is seen to be the plain path's."""
    plain = store.plain()
    fetched = store.fetch(user, as_of_us, length)
    check_same(fetched, plain.fetch(user, as_of_us, length))
    # Whole sequences, so that every byte is read: padding would cost nothing.
    first_B1 = torch.randint(store.num_rows - length, (len(user), 1), device="cuda")
    row_BL = first_B1 + torch.arange(length, device="cuda")
    all_BL, never_B = torch.ones_like(row_BL, dtype=torch.bool), as_of_us * 0 + NEVER_US + 1
    token_ND, available_us_N = store.token_ND, store.available_us_N
    out_BLD = torch.empty_like(fetched.token_BLD)
    copied = ms(lambda: out_BLD.copy_(fetched.token_BLD))
    gathered = ms(lambda: gather.tokens_at(token_ND, available_us_N, row_BL, all_BL, never_B))
    selected = ms(lambda: token_ND.index_select(0, row_BL.flatten()))
    whole = ms(lambda: store.fetch(user, as_of_us, length))
    slow = ms(lambda: plain.fetch(user, as_of_us, length))
    speed = 2 * out_BLD.numel() * out_BLD.element_size() / 1e9 / gathered * 1e3
    gather_of, fetch_of = (f"{part} {len(user)} x {length}" for part in ("gather", "fetch"))
    yield row(gather_of, speed, "GB/s", "device copy", copied / gathered, least=BARS[length])
    yield row(gather_of, speed, "GB/s", "index_select", selected / gathered)
    yield row(fetch_of, whole, "ms", "plain path", whole / slow)
    if length == min(BARS):
        yield row(fetch_of, whole, "ms", f"{MOST_MS} ms", whole / MOST_MS, most=1.0)


def row(
    name: str, value: float, unit: str, against: str, ratio: float, *,
    least: float | None = None, most: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    met = None
    if least is not None:
        met = ratio >= least
    elif most is not None:
        met = ratio <= most
    return {
        "name": name, "value": value, "unit": unit, "against": against, "ratio": ratio,
        "bar": least if least is not None else most, "met": met, "machine": ledger.machine(),
    }  # fmt: skip


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
