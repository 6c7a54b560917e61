"""A step of fixed shapes as one CUDA graph: hundreds of small kernels for the price of one launch.

What is captured must launch the same kernels on the same memory each time: no result of the device
may be asked for, and inputs are copied into tensors that stay where they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

WARM_UPS = 2
"""Runs before the capture, in which libraries choose kernels and optimizers make their state."""

BUILDING = threading.RLock()
"""Held while a model is made or a graph captured: both touch what a process has once, random state
and the pool of device memory."""


_idle_streams: list[torch.cuda.Stream] = []


class Captured(Generic[Result]):
    """A captured run; after `replay` its result holds the new values, on the current stream."""

    result: Result

    def __init__(self, run: Callable[[], Result], kept: Sequence[Tensor] = ()) -> None:
        """Capture `run`; the tensors it writes to, `kept`, are afterwards as they were before."""
        with BUILDING:
            # No two live graphs are captured on one stream: they would share the workspace of its
            # matrix products, write to it at once from two threads, and lose it with the first of
            # them that is freed. Streams are used again, because they come from a small ring: a new
            # one each time would soon be that on which another thread works.
            self._stream = _idle_streams.pop() if _idle_streams else torch.cuda.Stream()
            self._graph = torch.cuda.CUDAGraph()
            before = [tensor.detach().clone() for tensor in kept]
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            # Other threads go on with their own work meanwhile.
            with torch.cuda.graph(
                self._graph, stream=self._stream, capture_error_mode="thread_local"
            ):
                self.result = run()
            with torch.no_grad():
                for tensor, old in zip(kept, before, strict=True):
                    tensor.copy_(old)

    def replay(self) -> None:
        self._graph.replay()

    def __del__(self) -> None:
        self._graph.reset()
        _idle_streams.append(self._stream)
