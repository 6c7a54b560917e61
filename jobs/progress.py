"""Progress bars with the time left; in a worker process, ticks go to its pool's one bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_ticks: SimpleQueue[int] | None = None


def forward_to(ticks: SimpleQueue[int]) -> None:
    """From now on this process shows no bars: their ticks are counted in `ticks`."""
    global _ticks
    _ticks = ticks


class Bar(Protocol):
    """What jobs ask of a bar."""

    def update(self, n: int = 1) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Forwarded:
    ticks: SimpleQueue[int]

    def update(self, n: int = 1) -> None:
        self.ticks.put(n)

    def close(self) -> None: ...


def bar(total: int, *, desc: str, unit: str) -> Bar:
    """A tqdm bar, or in a worker process one that only forwards."""
    if _ticks is not None:
        return _Forwarded(_ticks)
    shown: Bar = tqdm(total=total, desc=desc, unit=unit)
    return shown


def ticked(items: Iterable[Item]) -> Iterator[Item]:
    """The items; in a worker process each is a tick of the pool's bar."""
    for item in items:
        yield item
        if _ticks is not None:
            _ticks.put(1)


def count(ticks: SimpleQueue[int]) -> int:
    """Ticks that arrived since the last look."""
    found = 0
    while not ticks.empty():
        found += ticks.get()
    return found
