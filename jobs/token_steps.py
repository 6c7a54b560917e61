"""Steps of a backfill that need torch, in worker processes without Spark. This module itself loads
neither, so that both sides may import it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context

from jobs.parent import end_with_parent
from pipelines.days import Days
from pipelines.errors import CheckFailedError, InputError, RetryableError

OURS = (InputError, CheckFailedError, RetryableError)
"""What a step may fail with while the others go on; the first kind met is the command's."""


@dataclass(frozen=True)
class Work:
    """Whose tokens are written, from where, on what; by a version's name."""

    domain: str
    lake: str
    version: str
    device: str


def pool(num_workers: int) -> ProcessPoolExecutor:
    """Processes that share the cores and end with this one."""
    return ProcessPoolExecutor(num_workers, get_context("spawn"), _begin, (num_workers,))


def _begin(num_workers: int) -> None:
    end_with_parent()
    if num_workers > 1:
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_workers))


def write(work: Work, days: Days) -> Exception | None:
    """The days' instance tokens; what it failed with."""
    from jobs import write_tokens

    return caught(lambda: write_tokens.write_alone(write_tokens.Args(**asdict(work)), days))


def sum_up(work: Work, days: Days) -> Exception | None:
    """The days' item tokens, from the instance tokens that are there; what it failed with."""
    from jobs import write_tokens

    return caught(lambda: write_tokens.sum_up(write_tokens.Args(**asdict(work)), days))


def caught(step: Callable[[], None]) -> Exception | None:
    """What a step failed with, as one of OURS; any other error is raised."""
    try:
        step()
    except OURS as error:
        return error
    except OSError as error:
        return RetryableError(str(error))
    return None
