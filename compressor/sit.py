"""Source Instance Transformer: attention over one user's tokens, strictly by time, many users
packed.

Li et al., "IAT: Instance-As-Token Compression", arXiv 2604.08933 (user-order source model); mask
and biases are ours.
visible(i, j) = same unit and (j is a token row and time[j] < time[i], or j == i). A query row (a
prediction) is seen by none.
Shape legend: P packed rows (token rows, then query rows), U units, L longest unit, D width, H
heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor.batch import Packing
from compressor.nn.attention import NUM_GAP_BUCKETS, gap_buckets

NUM_RANK_BUCKETS = 12


class SourceInstanceTransformer(nn.Module):
    """x_PD -> y_PD under the strict-time mask."""

    def __init__(self, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SitLayer(width, num_heads) for _ in range(num_layers))

    def forward(self, x_PD: Tensor, packing: Packing, *, is_fast: bool | None = None) -> Tensor:
        use_flex = bool(is_fast)
        view: _PaddedView | _FlexView = _FlexView(packing) if use_flex else _PaddedView(packing)
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

    def forward(self, x_PD: Tensor, view: _PaddedView | _FlexView) -> Tensor:
        x_PD = x_PD + self.out(view.attend(self.query_key_value(self.norm(x_PD)), self))
        return x_PD + self.feed_forward(x_PD)


def rank_buckets(rank_gap: Tensor) -> Tensor:
    """Tokens between two rows -> 0 .. 11 by log2."""
    return (
        torch.log2(1 + rank_gap.clamp(min=0).float()).floor().clamp(max=NUM_RANK_BUCKETS - 1).long()
    )


class _PaddedView:
    """The plain path: units padded inside the attention alone; keys are token rows and, in a
    column of its own, the row itself."""

    def __init__(self, packing: Packing) -> None:
        num_units, length = packing.num_units, packing.max_length
        num_tokens, device = packing.num_tokens, packing.unit.device
        self.length_K = int(packing.slot[:num_tokens].max()) + 1 if num_tokens else 1
        self.shape = (num_units, length)
        self.num_tokens = num_tokens
        self.at_P = packing.unit * length + packing.slot
        self.key_at = packing.unit[:num_tokens] * self.length_K + packing.slot[:num_tokens]
        time_UL, rank_UL = self._padded(packing.time), self._padded(packing.rank)
        time_UK, rank_UK = time_UL[:, : self.length_K], rank_UL[:, : self.length_K]
        is_token_UK = torch.zeros(num_units * self.length_K, dtype=torch.bool, device=device)
        is_token_UK = is_token_UK.index_fill(0, self.key_at, True).unflatten(
            0, (num_units, self.length_K)
        )
        self.hidden_ULK = ~(is_token_UK[:, None, :] & (time_UK[:, None, :] < time_UL[:, :, None]))
        gap_ULK = gap_buckets((time_UL[:, :, None] - time_UK[:, None, :]).float() / 1e6)
        self.bucket_ULK = gap_ULK * NUM_RANK_BUCKETS + rank_buckets(
            rank_UL[:, :, None] - rank_UK[:, None, :]
        )

    def _padded(self, x_P: Tensor) -> Tensor:
        flat = x_P.new_zeros((self.shape[0] * self.shape[1], *x_P.shape[1:]))
        return flat.index_copy(0, self.at_P, x_P).unflatten(0, self.shape)

    def _padded_keys(self, x_KX: Tensor) -> Tensor:
        flat = x_KX.new_zeros((self.shape[0] * self.length_K, x_KX.shape[1]))
        return flat.index_copy(0, self.key_at, x_KX).unflatten(0, (self.shape[0], self.length_K))

    def attend(self, qkv_PX: Tensor, layer: SitLayer) -> Tensor:
        query_PD, key_PD, value_PD = qkv_PX.chunk(3, dim=-1)
        heads = layer.num_heads
        query_UHLd = _heads(self._padded(query_PD), heads)
        key_UHKd, value_UHKd = (
            _heads(self._padded_keys(x[: self.num_tokens]), heads) for x in (key_PD, value_PD)
        )
        scale = query_UHLd.shape[-1] ** -0.5
        table_XH = layer.bias_table().to(query_PD.dtype)
        bias_UHLK = _BiasLookup.apply(table_XH, self.bucket_ULK)
        score_UHLK = (query_UHLd @ key_UHKd.transpose(-1, -2)) * scale + bias_UHLK
        score_UHLK = score_UHLK.masked_fill(self.hidden_ULK[:, None], float("-inf"))
        own_PH = (query_PD * key_PD).unflatten(-1, (heads, -1)).sum(-1) * scale + table_XH[0]
        own_UHL1 = self._padded(own_PH).transpose(1, 2)[..., None]
        weight = torch.cat([score_UHLK, own_UHL1], dim=-1).softmax(dim=-1)
        read_UHLd = weight[..., :-1] @ value_UHKd
        read_PD = read_UHLd.transpose(1, 2).flatten(2).flatten(0, 1)[self.at_P]
        own_weight_PH = weight[..., -1].transpose(1, 2).flatten(0, 1)[self.at_P]
        return read_PD + (own_weight_PH[..., None] * value_PD.unflatten(-1, (heads, -1))).flatten(
            -2
        )


def _heads(x_ULD: Tensor, num_heads: int) -> Tensor:
    return x_ULD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class _BiasLookup(torch.autograd.Function):
    """table_XH at bucket_ULK -> [U, H, L, K]; backward sums by bincount, far faster than an
    indexed add into few rows."""

    @staticmethod
    def forward(ctx: Any, table_XH: Tensor, bucket_ULK: Tensor) -> Tensor:
        ctx.save_for_backward(bucket_ULK)
        ctx.num_buckets = len(table_XH)
        return torch.stack([column[bucket_ULK] for column in table_XH.T.contiguous()], dim=1)

    @staticmethod
    def backward(ctx: Any, grad_UHLK: Tensor) -> tuple[Tensor, None]:
        (bucket_ULK,) = ctx.saved_tensors
        flat = bucket_ULK.flatten()
        sums = [
            torch.bincount(flat, g.flatten().float(), ctx.num_buckets) for g in grad_UHLK.unbind(1)
        ]
        return torch.stack(sums, dim=1).to(grad_UHLK.dtype), None


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
