"""Rows of the table `materialized` as the tensors of a fetch, without an index.

Shape legend: B rows, L sequence length, D token width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from downstream.token_store import Tokens
from pipelines.domain import Domain
from pipelines.errors import InputError
from pipelines.token_format import TokenFormat, decode

FIXED = ("token", "mask", "token_mask", "gap_s")


def tokens_of(rows: pa.Table, domain: Domain, form: TokenFormat, length: int) -> Tokens:
    """What a store of the line answers to the samples of `rows`, in their order; row_BL, which
    counts the rows of an index, is -1 throughout.

    Args:
        form, length: as the table's properties declare them (`token_format`).

    Errors: InputError where a list has not `length` entries, or a token not the format's bytes.
    """
    side = [f.stream_column for f in domain.side_features]
    side += [f"label_{label.name}" for label in domain.labels]
    flat = {name: _entries(rows, name, length, may_lack=name in side) for name in (*FIXED, *side)}
    shape = (len(rows), length)

    def tensor(name: str, dtype: npt.DTypeLike) -> Tensor:
        found = flat[name].to_numpy(zero_copy_only=False)
        return torch.from_numpy(np.array(found, dtype).reshape(shape))

    token = np.array(decode(flat["token"], form)).reshape(*shape, form.width)
    return Tokens(
        token_BLD=torch.from_numpy(token),
        mask_BL=tensor("mask", bool),
        token_mask_BL=tensor("token_mask", bool),
        gap_s_BL=tensor("gap_s", np.float32),
        side={name: tensor(name, np.int32) for name in side},
        row_BL=torch.full(shape, -1),
    )


def _entries(rows: pa.Table, name: str, length: int, *, may_lack: bool) -> pa.Array:
    """The entries of a column of lists, one after another; a list of a side column that came later
    is empty, and reads as zeros."""
    column = rows.column(name).combine_chunks()
    num = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    is_empty = (num == 0) & may_lack
    if not (is_empty | (num == length)).all():
        found = ", ".join(map(str, sorted(set(num.tolist()))))
        raise InputError(f"{name} needs lists of {length} entries, got {found}")
    entries = column.flatten()
    if not is_empty.any():
        return entries
    filled = np.zeros((len(num), length), np.int32)
    filled[~is_empty] = entries.to_numpy().reshape(-1, length)
    return pa.array(filled.reshape(-1))
