"""Tokens as bytes and back, for tensors; the format itself is `pipelines.token_format`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pipelines import token_format
from pipelines.token_format import CODECS, TokenFormat, declare, declared

__all__ = ["CODECS", "TokenFormat", "declare", "declared", "decode", "encode"]


def encode(vectors: Tensor | npt.NDArray[Any], codec: str = "float16") -> pa.BinaryArray:
    """[n, D] finite numbers (any device and dtype) as one binary value a row."""
    if isinstance(vectors, Tensor):
        # Through float32: numpy has no bfloat16.
        vectors = vectors.detach().to("cpu", torch.float32).numpy()
    return token_format.encode(vectors, codec)


def decode(
    column: pa.Array | pa.ChunkedArray, width: int, codec: str = "float16"
) -> npt.NDArray[np.float16]:
    """Encoded tokens as [n, D] without a copy per row; nulls and other widths are refused."""
    return token_format.decode(column, TokenFormat(codec, width))
