"""A step of fixed shapes as one CUDA graph: hundreds of small kernels for the price of one launch.

What is captured must launch the same kernels on the same memory each time: no result of the device
may be asked for, and inputs are copied into tensors that stay where they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

WARM_UPS = 2
"""Runs before the capture, in which libraries choose kernels and optimizers make their state."""

BUILDING = threading.RLock()
"""Held while a model is made or a graph captured: both touch what a process has once, random state
and the pool of device memory."""


@dataclass(frozen=True)
class Captured(Generic[Result]):
    """A captured run; after `replay` its result holds the new values, on the current stream."""

    graph: torch.cuda.CUDAGraph
    result: Result

    @classmethod
    def of(cls, run: Callable[[], Result], kept: Sequence[Tensor] = ()) -> Captured[Result]:
        """Capture `run`; the tensors it writes to, `kept`, are afterwards as they were before."""
        with BUILDING:
            before = [tensor.detach().clone() for tensor in kept]
            current, aside = torch.cuda.current_stream(), _capture_stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    run()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads go on with their own work meanwhile.
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                result = run()
            with torch.no_grad():
                for tensor, old in zip(kept, before, strict=True):
                    tensor.copy_(old)
        return cls(graph, result)

    def replay(self) -> None:
        self.graph.replay()


_threads = threading.local()


def _capture_stream() -> torch.cuda.Stream:
    """One a thread. Graphs of two threads that were captured on one stream would share a matrix
    product's workspace while they run at once; and streams come from a small ring, so that a new
    one each time would soon be that on which another thread works."""
    if not hasattr(_threads, "stream"):
        _threads.stream = torch.cuda.Stream()
    stream: torch.cuda.Stream = _threads.stream
    return stream
