"""What the fetch code says of some ranker rows, and where the oracle says something else.

Shape legend: n ranker rows, L sequence length, D token width, M match features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from downstream.match_features import ITEM, MatchIndex
from downstream.token_store import TokenStore
from downstream.user_index import IndexStore, UserIndex
from jobs.oracle import Oracle, Sample
from pipelines.domain import Domain

Array = npt.NDArray[Any]
Opener = Callable[[str, Path], "Reader"]
"""(lake, an empty folder) -> what reads that lake; tests hand in readers with planted faults."""

NUM_SHOWN = 5
ITEM_TOLERANCE = 1e-3
"""Item tokens are sums of float16 tokens kept as float32: relative to their length."""
MATCH_TOLERANCE = 4e-6
"""Counts to 10^5 and gaps of years differ by more in log1p; float32 keeps them nearer."""
PADDING = -1


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing verified: how many rows, how many differ, the first of them."""

    name: str
    rows: int
    differences: int
    passed: bool | None
    """None: does not apply to this domain."""
    note: str = ""
    failing: list[dict[str, Any]] = field(default_factory=list)


def check(
    name: str, is_wrong: Array, show: Callable[[int], Mapping[str, Any]], note: str = ""
) -> Check:
    """A check over rows: passed if none is wrong; shows the first wrong ones."""
    wrong = np.flatnonzero(is_wrong)
    return Check(
        name=name,
        rows=len(is_wrong),
        differences=len(wrong),
        passed=not len(wrong),
        note=note,
        failing=[dict(show(int(row))) for row in wrong[:NUM_SHOWN]],
    )


@dataclass(frozen=True)
class Reader:
    """The fetch code over one lake: its store, which instance each index row is, its matches."""

    store: TokenStore
    instance_id: Array
    match: MatchIndex


def open_reader(domain: Domain, line: str) -> Opener:
    """The toolkit's own fetch code: an index built in the folder, on the CPU."""

    def opener(lake: str, folder: Path) -> Reader:
        index = UserIndex.build(lake, domain, folder, days=None, lines=[line])
        store = IndexStore(index, line)
        return Reader(store, index.arrays["instance_id"], MatchIndex.build(store))

    return opener


@dataclass(frozen=True)
class Answers:
    """Everything fetched for n rows; two fetches of the same rows are compared by `moved`."""

    instance: Array
    """PADDING where there is no event."""
    gap_s: Array
    token: Array
    token_mask: Array
    side: Mapping[str, Array]
    item: Array
    item_mask: Array
    item_count: Array
    match: Mapping[str, Array]

    def moved(self, other: Answers) -> dict[str, Array]:
        """Which rows differ in what, bit for bit."""
        parts: dict[str, tuple[Array, Array]] = {
            "events": (self.instance, other.instance),
            "gaps": (self.gap_s, other.gap_s),
            "tokens": (self.token, other.token),
            "readable tokens": (self.token_mask, other.token_mask),
            "item tokens": (self.item, other.item),
            "readable item tokens": (self.item_mask, other.item_mask),
            "item counts": (self.item_count, other.item_count),
        }
        parts |= {name: (column, other.side[name]) for name, column in self.side.items()}
        parts |= {name: (column, other.match[name]) for name, column in self.match.items()}
        return {name: (a != b).reshape(len(a), -1).any(axis=1) for name, (a, b) in parts.items()}


def ask(
    reader: Reader,
    sample: Sample,
    length: int,
    *,
    user_id: Array | None = None,
    item_token_of: Array | None = None,
    instance_of: Array | None = None,
) -> Answers:
    """Fetch everything for the sample's rows.

    In a lake whose users, items or instances have other ids: `user_id` and `item_token_of` [n] are
    what to ask for in their place, and `instance_of` translates the index's instance ids back.
    """
    users = torch.from_numpy(sample.ints("user_id") if user_id is None else user_id)
    items = sample.ints("item_id")
    as_of = torch.from_numpy(sample.ints("as_of_us"))
    tokens = reader.store.fetch(users, as_of, length)
    of_items = torch.from_numpy(items if item_token_of is None else item_token_of)
    item_tokens = reader.store.fetch_items(of_items, as_of)
    side = {
        name: torch.from_numpy(sample.ints(f"bucket_{name.removeprefix('f_')}"))
        for name in reader.match.fields
        if name != ITEM
    }
    match = reader.match.features(users, as_of, torch.from_numpy(items), side).cpu().numpy()
    row = tokens.row_BL.cpu().numpy()
    ids = np.asarray(reader.instance_id)
    found = ids[np.maximum(row, 0)] if len(ids) else row
    if instance_of is not None:
        found = instance_of[found]
    return Answers(
        instance=np.where(tokens.mask_BL.cpu().numpy(), found, PADDING),
        gap_s=tokens.gap_s_BL.cpu().numpy(),
        token=tokens.token_BLD.cpu().numpy(),
        token_mask=tokens.token_mask_BL.cpu().numpy(),
        side={name: column.cpu().numpy() for name, column in tokens.side.items()},
        item=item_tokens.token_BD.cpu().numpy(),
        item_mask=item_tokens.mask_B.cpu().numpy(),
        item_count=item_tokens.count_B.cpu().numpy(),
        match=dict(zip(reader.match.names, match.T, strict=True)),
    )


@dataclass(frozen=True)
class Expected:
    """The oracle's histories as [n, L] arrays, oldest first, left-padded."""

    instance: Array
    gap_s: Array
    labels: Mapping[str, Array]
    token: Array
    """Stored bytes, or None where none was readable."""
    values: Mapping[str, Array]
    """Readable side information by stream column; None: missing or padding."""

    @classmethod
    def of(cls, oracle: Oracle, num_rows: int, length: int) -> Expected:
        found = oracle.histories(length)
        at = (
            found.column("k").to_numpy(),
            length - np.asarray(found.column("back").to_numpy(), np.int64),
        )

        def dense(name: str, dtype: Any, fill: Any) -> Array:
            filled = np.full((num_rows, length), fill, dtype)
            filled[at] = found.column(name).to_numpy(zero_copy_only=False)
            return filled

        gap_us = dense("gap_us", np.int64, 0)
        names = [f.stream_column for f in oracle.domain.side_features]
        return cls(
            instance=dense("instance_id", np.int64, PADDING),
            gap_s=(gap_us / 1e6).astype(np.float32),
            labels={
                f"label_{x.name}": dense(f"label_{x.name}", np.int32, 0)
                for x in oracle.domain.labels
            },
            token=dense("token", object, None),
            values={name: dense(name, object, None) for name in names},
        )


def compare_histories(
    sample: Sample, answers: Answers, expected: Expected, buckets: Mapping[str, Mapping[str, int]]
) -> list[Check]:
    """Events and their order, gaps, labels, tokens and side information against the oracle."""
    ids, as_of = sample.ints("instance_id"), sample.ints("as_of_us")

    def rows_that_differ(a: Array, b: Array) -> Array:
        return np.asarray((a != b).any(axis=1))

    def first(got: Array, wanted: Array) -> Callable[[int], Mapping[str, Any]]:
        def show(row: int) -> Mapping[str, Any]:
            step = int(np.flatnonzero(got[row] != wanted[row])[-1])
            back = got.shape[1] - step
            return {
                "instance_id": int(ids[row]),
                "as_of_us": int(as_of[row]),
                "events_back": back,
                "expected": _plain(wanted[row, step]),
                "fetched": _plain(got[row, step]),
            }

        return show

    def compared(name: str, got: Array, wanted: Array, note: str = "") -> Check:
        return check(name, rows_that_differ(got, wanted), first(got, wanted), note)

    token_got = _as_bytes(answers)
    checks = [
        compared("history events and order", answers.instance, expected.instance),
        compared("history time gaps", answers.gap_s, expected.gap_s),
        *(
            compared(f"history {name} as known", answers.side[name], wanted)
            for name, wanted in expected.labels.items()
        ),
        compared("history tokens", token_got, expected.token, _coverage(answers)),
    ]
    for name, values in expected.values.items():
        known = buckets[name]
        wanted = np.array(
            [[known.get(x, 0) if x is not None else 0 for x in row] for row in values]
        )
        checks.append(compared(f"history {name}", answers.side[name], wanted))
    return checks


def compare_matches(sample: Sample, answers: Answers, wanted: pa.Table) -> Check:
    """Match features against the oracle's counts and gaps: exact but for float32's last bits."""
    columns = {name: wanted.column(name).to_numpy() for name in wanted.schema.names}
    is_off = {}
    for name, got in answers.match.items():
        field, _, what = name.rpartition("_")
        if what in ("hours", "never"):
            gap_us = columns[f"{field}_gap_us"].astype(np.float64)
            is_never = np.isnan(gap_us)
            hours = np.log1p(np.where(is_never, 0, gap_us) / 3.6e9)
            expected = is_never if what == "never" else hours
        else:
            expected = np.log1p(columns[name].astype(np.float64))
        is_off[name] = ~(np.abs(got - expected) <= MATCH_TOLERANCE)
    num_used = sum(bool((values != 0).any()) for values in answers.match.values())
    return check(
        "match features",
        np.logical_or.reduce(list(is_off.values())),
        lambda row: {
            "instance_id": int(sample.ints("instance_id")[row]),
            "as_of_us": int(sample.ints("as_of_us")[row]),
            "fetched": {n: float(answers.match[n][row]) for n, off in is_off.items() if off[row]},
            "expected": {n: _plain(values[row]) for n, values in columns.items()},
        },
        f"{len(is_off)} features, {num_used} of them not always 0",
    )


def compare_item_tokens(
    sample: Sample, answers: Answers, wanted: tuple[Array, Array, Array]
) -> Check:
    """Item tokens as of the row's day against the oracle's sums."""
    token, count, is_there = wanted
    if not token.shape[1]:
        token = np.zeros_like(answers.item)
    error = np.linalg.norm(answers.item - token, axis=1)
    size = np.linalg.norm(token, axis=1)
    relative = np.where(size > 0, error / np.maximum(size, 1e-30), error)
    count_off = np.abs(answers.item_count - count) > ITEM_TOLERANCE * np.maximum(count, 1)
    mask_off = answers.item_mask != is_there
    # Written so that a NaN is wrong.
    is_wrong = mask_off | count_off | ~(relative <= ITEM_TOLERANCE)
    worst = float(np.max(relative, initial=0.0))
    return check(
        "item tokens as of the day",
        is_wrong,
        lambda row: {
            "instance_id": int(sample.ints("instance_id")[row]),
            "as_of_us": int(sample.ints("as_of_us")[row]),
            "relative_error": float(relative[row]),
            "expected": f"count {count[row]:.3f}",
            "fetched": f"count {answers.item_count[row]:.3f}",
        },
        f"largest relative error {worst:.1e}; {int(is_there.sum())} rows have one",
    )


def compare_disturbed(sample: Sample, before: Answers, after: Answers, note: str) -> Check:
    """Nothing fetched may differ, bit for bit, after every later event was changed."""
    moved = before.moved(after)
    return check(
        "disturbed future moves nothing",
        np.logical_or.reduce(list(moved.values())),
        lambda row: {
            "instance_id": int(sample.ints("instance_id")[row]),
            "as_of_us": int(sample.ints("as_of_us")[row]),
            "moved": [name for name, is_moved in moved.items() if is_moved[row]],
        },
        note,
    )


def _as_bytes(answers: Answers) -> Array:
    """Fetched tokens as bytes [n, L], None where none was readable: compared bit for bit."""
    num_rows, length, _ = answers.token.shape
    found = np.full((num_rows, length), None, object)
    for row, step in np.argwhere(answers.token_mask):
        found[row, step] = answers.token[row, step].tobytes()
    return found


def _coverage(answers: Answers) -> str:
    num_events = int((answers.instance != PADDING).sum())
    num_tokens = int(answers.token_mask.sum())
    return f"{num_tokens} of {num_events} events had a readable token"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"token {np.frombuffer(value, '<f2')[:4].tolist()}..."
    return value.item() if isinstance(value, np.generic) else value


def passed(checks: Sequence[Check]) -> bool:
    return all(each.passed is not False for each in checks)
