"""Every field of the domain file -> feature tokens -> RankMixer -> h, row by row.

Zhu et al., "RankMixer", arXiv 2507.15551 (tokenisation by groups: user, item, context; no token
mixes two sides).
Shape legend: N rows, S id slots, M numbers, F fields, E embedding width, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.configs import SourceConfig
from compressor.nn.embedding import FieldPooling, NumberEncoder
from compressor.nn.mixing import RankMixer
from pipelines.features import FeatureLayout


class FieldVectors(nn.Module):
    """Slot vectors and numbers -> one flat vector per group of fields."""

    def __init__(self, layout: FeatureLayout, groups: list[list[str]], embedding: int) -> None:
        super().__init__()
        self.pooling = FieldPooling(layout.slot_fields)
        self.number_encoder = NumberEncoder(len(layout.numbers))
        fields = [f.name for f in layout.categorical]
        numbers = [f.name for f in layout.numbers]
        num_numbers = len(numbers)
        self.field_of = [[fields.index(n) for n in group if n in fields] for group in groups]
        self.number_of = [
            [k * num_numbers + numbers.index(n) for k in range(3) for n in group if n in numbers]
            for group in groups
        ]
        self.widths = [
            len(f) * embedding + len(n) for f, n in zip(self.field_of, self.number_of, strict=True)
        ]

    def forward(self, vectors_NSE: Tensor, rows_NS: Tensor, numbers_NM: Tensor) -> list[Tensor]:
        fields_NFE = self.pooling(vectors_NSE, rows_NS)
        encoded_NM = self.number_encoder(numbers_NM)
        return [
            torch.cat([fields_NFE[:, f].flatten(1), encoded_NM[:, n]], dim=1)
            for f, n in zip(self.field_of, self.number_of, strict=True)
        ]


class Encoder(nn.Module):
    """Request-known fields -> h_NX with X = T * D; no row reads another."""

    def __init__(self, config: SourceConfig, layout: FeatureLayout) -> None:
        super().__init__()
        sides = [
            [f.name for f in layout.features if f.side == side]
            for side in ("user", "item", "context", "event")
        ]
        groups = [group for group in sides if group]
        self.fields = FieldVectors(layout, groups, config.embedding)
        self.num_tokens = config.num_tokens
        shares = _shares([len(g) for g in groups], config.num_tokens)
        self.project = nn.ModuleList(
            nn.Linear(width, share * config.width)
            for width, share in zip(self.fields.widths, shares, strict=True)
        )
        self.width = config.num_tokens * config.width
        self.mixer = RankMixer(num_tokens=config.num_tokens, width=config.width, depth=config.depth)

    def forward(self, vectors_NSE: Tensor, rows_NS: Tensor, numbers_NM: Tensor) -> Tensor:
        groups = self.fields(vectors_NSE, rows_NS, numbers_NM)
        flat_NX = torch.cat(
            [project(g) for project, g in zip(self.project, groups, strict=True)], dim=1
        )
        return self.mixer(flat_NX.unflatten(1, (self.num_tokens, -1))).flatten(1)


def _shares(sizes: list[int], num_tokens: int) -> list[int]:
    """Tokens per group: at least one each, the rest by size."""
    if len(sizes) > num_tokens:
        raise ValueError(
            f"num_tokens {num_tokens} must be at least the number of feature groups {len(sizes)}"
        )
    shares = [1] * len(sizes)
    while sum(shares) < num_tokens:
        neediest = max(range(len(sizes)), key=lambda g: sizes[g] / shares[g])
        shares[neediest] += 1
    return shares
