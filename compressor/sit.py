"""Source Instance Transformer: attention over one user's tokens, strictly by time, many users
packed.

Li et al., "IAT: Instance-As-Token Compression", arXiv 2604.08933 (user-order source model); mask
and biases are ours.
visible(i, j) = same unit and (j is a token row and time[j] < time[i], or j == i). A query row (a
prediction) is seen by none.
Shape legend: P packed rows (token rows, then query rows), U units, B blocks of L rows, K token rows
of the longest unit, D width, H heads.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor.batch import Packing
from compressor.nn.attention import NUM_GAP_BUCKETS, gap_buckets

NUM_RANK_BUCKETS = 12
BLOCK = 64
"""Rows of a unit that the plain path attends for together."""
SHORT = 128
"""Token rows of a unit up to which units are padded to one length."""


class View(Protocol):
    """Who sees whom among packed rows, computed once for all layers."""

    def attend(self, qkv_PX: Tensor, layer: SitLayer) -> Tensor:
        """read_PD."""
        ...


class SourceInstanceTransformer(nn.Module):
    """x_PD -> y_PD under the strict-time mask."""

    def __init__(self, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SitLayer(width, num_heads) for _ in range(num_layers))

    def forward(self, x_PD: Tensor, packing: Packing, *, is_fast: bool | None = None) -> Tensor:
        view: View = _FlexView(packing) if is_fast else _padded_view(packing)
        for layer in self.layers:
            x_PD = layer(x_PD, view)
        return x_PD


class SitLayer(nn.Module):
    """Pre-norm attention and feed-forward on packed rows."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.gap_bias = nn.Parameter(torch.zeros(NUM_GAP_BUCKETS, num_heads))
        self.rank_bias = nn.Parameter(torch.zeros(NUM_RANK_BUCKETS, num_heads))

    def bias_table(self) -> Tensor:
        """[gap buckets x rank buckets, H] learned score biases."""
        return (self.gap_bias[:, None] + self.rank_bias[None]).flatten(0, 1)

    def forward(self, x_PD: Tensor, view: View) -> Tensor:
        x_PD = x_PD + self.out(view.attend(self.query_key_value(self.norm(x_PD)), self))
        return x_PD + self.feed_forward(x_PD)


def rank_buckets(rank_gap: Tensor) -> Tensor:
    """Tokens between two rows -> 0 .. 11 by log2."""
    return (
        torch.log2(1 + rank_gap.clamp(min=0).float()).floor().clamp(max=NUM_RANK_BUCKETS - 1).long()
    )


def _padded_view(packing: Packing) -> View:
    """The plain path; units of unlike lengths apart (by factors of two), for padding costs memory
    and time with every key."""
    tokens_U = torch.bincount(packing.unit[: packing.num_tokens], minlength=packing.num_units)
    group_U = torch.log2(tokens_U.clamp(min=SHORT) / SHORT).ceil().long()
    groups = torch.unique(group_U).tolist()
    if len(groups) < 2:
        return _PaddedView(packing)
    return _GroupedView(packing, group_U, groups)


class _GroupedView:
    """Some padded views, each of other units."""

    def __init__(self, packing: Packing, group_U: Tensor, groups: list[int]) -> None:
        group_P = group_U[packing.unit]
        self.rows = [(group_P == group).nonzero().squeeze(1) for group in groups]
        self.back = torch.argsort(torch.cat(self.rows))
        self.views = [_PaddedView(_of(packing, rows)) for rows in self.rows]

    def attend(self, qkv_PX: Tensor, layer: SitLayer) -> Tensor:
        found = [
            view.attend(qkv_PX[rows], layer)
            for rows, view in zip(self.rows, self.views, strict=True)
        ]
        return torch.cat(found)[self.back]


def _of(packing: Packing, rows: Tensor) -> Packing:
    """The packing of some units' rows alone."""
    units, unit = torch.unique(packing.unit[rows], return_inverse=True)
    return Packing(
        unit,
        packing.time[rows],
        packing.rank[rows],
        packing.slot[rows],
        int((rows < packing.num_tokens).sum()),
        len(units),
        packing.max_length,
    )


class _PaddedView:
    """The plain path: rows padded inside the attention alone, in blocks of one unit's rows, so that
    a long unit does not make the others long; keys are token rows and, in a column of its own, the
    row itself."""

    def __init__(self, packing: Packing) -> None:
        num_units, num_tokens, device = packing.num_units, packing.num_tokens, packing.unit.device
        self.length_K = int(packing.slot[:num_tokens].max()) + 1 if num_tokens else 1
        self.num_units, self.num_tokens = num_units, num_tokens
        blocks_U = -(-torch.bincount(packing.unit, minlength=num_units) // BLOCK)
        first_U = torch.cumsum(blocks_U, 0) - blocks_U
        self.unit_B = torch.repeat_interleave(torch.arange(num_units, device=device), blocks_U)
        self.shape = (len(self.unit_B), BLOCK)
        block_P = first_U[packing.unit] + packing.slot // BLOCK
        self.at_P = block_P * BLOCK + packing.slot % BLOCK
        self.key_at = packing.unit[:num_tokens] * self.length_K + packing.slot[:num_tokens]
        time_BL, rank_BL = self._padded(packing.time), self._padded(packing.rank)
        time_BK, rank_BK, is_token_BK = (
            self._padded_keys(x_P[:num_tokens, None]).squeeze(2)[self.unit_B]
            for x_P in (packing.time, packing.rank, torch.ones_like(packing.slot))
        )
        self.hidden_BLK = ~(
            (is_token_BK[:, None, :] > 0) & (time_BK[:, None, :] < time_BL[:, :, None])
        )
        gap_BLK = gap_buckets((time_BL[:, :, None] - time_BK[:, None, :]).float() / 1e6)
        self.bucket_BLK = gap_BLK * NUM_RANK_BUCKETS + rank_buckets(
            rank_BL[:, :, None] - rank_BK[:, None, :]
        )

    def _padded(self, x_P: Tensor) -> Tensor:
        flat = x_P.new_zeros((self.shape[0] * self.shape[1], *x_P.shape[1:]))
        return flat.index_copy(0, self.at_P, x_P).unflatten(0, self.shape)

    def _padded_keys(self, x_KX: Tensor) -> Tensor:
        flat = x_KX.new_zeros((self.num_units * self.length_K, x_KX.shape[1]))
        return flat.index_copy(0, self.key_at, x_KX).unflatten(0, (self.num_units, self.length_K))

    def attend(self, qkv_PX: Tensor, layer: SitLayer) -> Tensor:
        query_PD, key_PD, value_PD = qkv_PX.chunk(3, dim=-1)
        heads = layer.num_heads
        query_BHLd = _heads(self._padded(query_PD), heads)
        key_BHKd, value_BHKd = (
            _heads(self._padded_keys(x[: self.num_tokens]), heads).index_select(0, self.unit_B)
            for x in (key_PD, value_PD)
        )
        scale = query_BHLd.shape[-1] ** -0.5
        table_XH = layer.bias_table().to(query_PD.dtype)
        bias_BHLK = _BiasLookup.apply(table_XH, self.bucket_BLK)
        score_BHLK = (query_BHLd @ key_BHKd.transpose(-1, -2)) * scale + bias_BHLK
        score_BHLK = score_BHLK.masked_fill(self.hidden_BLK[:, None], float("-inf"))
        own_PH = (query_PD * key_PD).unflatten(-1, (heads, -1)).sum(-1) * scale + table_XH[0]
        own_BHL1 = self._padded(own_PH).transpose(1, 2)[..., None]
        weight = torch.cat([score_BHLK, own_BHL1], dim=-1).softmax(dim=-1)
        read_BHLd = weight[..., :-1] @ value_BHKd
        read_PD = read_BHLd.transpose(1, 2).flatten(2).flatten(0, 1)[self.at_P]
        own_weight_PH = weight[..., -1].transpose(1, 2).flatten(0, 1)[self.at_P]
        return read_PD + (own_weight_PH[..., None] * value_PD.unflatten(-1, (heads, -1))).flatten(
            -2
        )


def _heads(x_BLD: Tensor, num_heads: int) -> Tensor:
    return x_BLD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class _BiasLookup(torch.autograd.Function):
    """table_XH at bucket_BLK -> [B, H, L, K]; backward sums by bincount, far faster than an
    indexed add into few rows."""

    @staticmethod
    def forward(ctx: Any, table_XH: Tensor, bucket_BLK: Tensor) -> Tensor:
        ctx.save_for_backward(bucket_BLK)
        ctx.num_buckets = len(table_XH)
        return torch.stack([column[bucket_BLK] for column in table_XH.T.contiguous()], dim=1)

    @staticmethod
    def backward(ctx: Any, grad_BHLK: Tensor) -> tuple[Tensor, None]:
        (bucket_BLK,) = ctx.saved_tensors
        flat = bucket_BLK.flatten()
        sums = [
            torch.bincount(flat, g.flatten().float(), ctx.num_buckets) for g in grad_BHLK.unbind(1)
        ]
        return torch.stack(sums, dim=1).to(grad_BHLK.dtype), None


class _FlexView:
    """The fast path on a GPU: rows stay packed, blocks of other units are skipped
    (FlexAttention)."""

    def __init__(self, packing: Packing) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        # Rows of one unit next to each other, so that whole blocks of other units are skipped.
        self.order = torch.argsort(packing.unit * packing.max_length + packing.slot)
        self.back = torch.argsort(self.order)
        unit, rank = packing.unit[self.order], packing.rank[self.order]
        since = packing.time[self.order] - packing.time.min()
        is_token = self.order < packing.num_tokens
        self.seconds = since.double() / 1e6
        self.rank = rank

        def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (unit[i] == unit[j]) & ((is_token[j] & (since[j] < since[i])) | (i == j))

        num_rows = len(unit)
        self.block_mask = create_block_mask(
            visible, None, None, num_rows, num_rows, device=str(unit.device)
        )

    def attend(self, qkv_PX: Tensor, layer: SitLayer) -> Tensor:
        seconds, rank = self.seconds, self.rank
        gap_bias, rank_bias = layer.gap_bias, layer.rank_bias

        def bias(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            gap = gap_buckets((seconds[i] - seconds[j]).float())
            return score + gap_bias[gap, head] + rank_bias[rank_buckets(rank[i] - rank[j]), head]

        x_1PX = qkv_PX[self.order][None].unflatten(-1, (3, layer.num_heads, -1))
        query, key, value = (x.transpose(1, 2) for x in x_1PX.unbind(2))
        out_1HPd = _flex()(query, key, value, score_mod=bias, block_mask=self.block_mask)
        return out_1HPd.transpose(1, 2).flatten(2)[0][self.back]


_COMPILED: list[object] = []


def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if not _COMPILED:
        _COMPILED.append(torch.compile(flex_attention, dynamic=True))
    return _COMPILED[0]
