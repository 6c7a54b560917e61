"""Blocks of a model as fused kernels: what they are made of is small, and moving it is what costs.

One compilation serves every model in the process that has a block of the same shapes.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import nn

log = logging.getLogger(__name__)


def fuse(model: nn.Module, kinds: tuple[type[nn.Module], ...], *, dynamic: bool) -> None:
    """Compile the model's outermost parts of these kinds in place, if this machine can.

    Args:
        dynamic: the parts' inputs differ in size from call to call.
    """
    if not can_fuse():
        return
    if isinstance(model, kinds):
        if model._compiled_call_impl is None:
            model.compile(dynamic=dynamic)
        return
    for part in model.children():
        fuse(part, kinds, dynamic=dynamic)


@cache
def can_fuse() -> bool:
    """Whether kernels can be compiled here: a GPU, a C compiler, Python's headers."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.compile(_probe)(torch.ones(8, device="cuda"))
    except Exception as error:  # whatever a half-installed compiler may raise
        log.warning("kernels cannot be fused here, steps take longer: %s", error)
        return False
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
