"""The stage-1 ranker that holds the bottleneck: temporal-order (rows alone) and user-order (with
SIT).

Li et al., "IAT: Instance-As-Token Compression", arXiv 2604.08933; papers' sections 1.3 and 1.4.
The stored token is the bottleneck vector *before* SIT; what SIT reads is stored in its place as a
control only. Fields known only after the event enter the token beside the bottleneck's input and
never a row's own prediction: in user order only later rows' losses train them.
Shape legend: N rows, K token rows, Q query rows, D bottleneck width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressor.batch import Packing, SourceBatch
from compressor.configs import SourceConfig
from compressor.encoder import Encoder, FieldVectors
from compressor.nn.embedding import EmbeddingBank, Vocabulary
from compressor.sit import SourceInstanceTransformer
from pipelines.domain import Domain
from pipelines.features import FeatureLayout


class SourceOutput(NamedTuple):
    logit_Q: Tensor
    token_KD: Tensor
    """Pre-SIT tokens of the token rows: what is stored."""
    read_QD: Tensor | None
    """What SIT reads for each query row; None where rows are predicted alone."""


class SourceModel(nn.Module):
    """Predicts each query row from its own fields and, in user order, from strictly earlier tokens
    of its user."""

    def __init__(
        self, config: SourceConfig, domain: Domain, vocabulary: Vocabulary, *, seed: int
    ) -> None:
        super().__init__()
        self.config = config
        request, after = (
            FeatureLayout.of(domain, known="request"),
            FeatureLayout.of(domain, known="after"),
        )
        self.bank = EmbeddingBank(vocabulary, config.embedding, seed=seed, std=config.embedding_std)
        self.encoder = Encoder(config, request)
        self.norm = nn.LayerNorm(self.encoder.width)
        self.compress_in = nn.Linear(self.encoder.width, config.bottleneck)
        self.token_norm = nn.LayerNorm(config.bottleneck, elementwise_affine=False)
        is_user_order = config.order == "user"
        self.after_fields = FieldVectors(
            after, [[f.name for f in after.features]], config.embedding
        )
        has_after = is_user_order and self.after_fields.widths[0] > 0
        self.after_in = (
            _AfterInput(self.after_fields.widths[0], config.bottleneck) if has_after else None
        )
        self.sit = (
            SourceInstanceTransformer(config.bottleneck, config.sit_layers, config.heads)
            if is_user_order
            else None
        )
        # A linear way from what SIT reads to the logit: without it a model from scratch may spend
        # passes before any of its losses reach the tokens of the past.
        self.wide = nn.Linear(config.bottleneck, 1) if is_user_order else None
        decoder_in = config.bottleneck * (2 if is_user_order else 1)
        self.decoder = nn.Sequential(
            nn.Linear(decoder_in, config.decoder), nn.GELU(), nn.Linear(config.decoder, 1)
        )

    def hidden(self, rows_NS: Tensor, numbers_NM: Tensor) -> Tensor:
        """The bottleneck's linear input, from request-known fields alone; row-wise."""
        return self.compress_in(self.norm(self.encoder(self.bank(rows_NS), rows_NS, numbers_NM)))

    def squeeze(self, input_ND: Tensor) -> Tensor:
        """sigma and the final norm: all tokens on one scale, so that float16 and stale vectors
        behave."""
        return self.token_norm(nn.functional.gelu(input_ND))

    def tokens(
        self, rows_NS: Tensor, numbers_NM: Tensor, after_rows_NS: Tensor, after_numbers_NM: Tensor
    ) -> Tensor:
        """[N, D] tokens to store; each depends on its own row only."""
        return self.squeeze(
            self.hidden(rows_NS, numbers_NM) + self._after(after_rows_NS, after_numbers_NM)
        )

    def _after(self, rows_NS: Tensor, numbers_NM: Tensor) -> Tensor | float:
        if self.after_in is None:
            return 0.0
        (flat_NX,) = self.after_fields(self.bank(rows_NS), rows_NS, numbers_NM)
        return self.after_in(flat_NX)

    def forward(self, batch: SourceBatch) -> SourceOutput:
        """Packed units: every token row is compressed live, with gradient."""
        hidden_ND = self.hidden(batch.rows_NS, batch.numbers_NM)
        token_KD = self.squeeze(
            hidden_ND[batch.token_K]
            + self._after(batch.after_rows_NS[batch.token_K], batch.after_numbers_NM[batch.token_K])
        )
        own_QD = self.squeeze(hidden_ND[batch.query_Q])
        return self.predict(own_QD, token_KD, batch.packing)

    def forward_stored(self, batch: SourceBatch, stored_KD: Tensor) -> SourceOutput:
        """The streaming mode: the same predictions from stored tokens, through which no gradient
        flows."""
        own_QD = self.squeeze(
            self.hidden(batch.rows_NS[batch.query_Q], batch.numbers_NM[batch.query_Q])
        )
        return self.predict(own_QD, stored_KD.detach(), batch.packing)

    def predict(self, own_QD: Tensor, token_KD: Tensor, packing: Packing) -> SourceOutput:
        """Logits from each query's own compressed fields and what SIT reads for it."""
        if self.sit is None or self.wide is None:
            return SourceOutput(self.decoder(own_QD).squeeze(-1), token_KD, None)
        read_QD = self.sit(torch.cat([token_KD, own_QD]), packing)[len(token_KD) :]
        logit_Q1 = self.decoder(torch.cat([read_QD, own_QD], dim=1)) + self.wide(read_QD)
        return SourceOutput(logit_Q1.squeeze(-1), token_KD, read_QD)


class _AfterInput(nn.Module):
    """Fields known after the event, as a term beside the bottleneck's input."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, flat_NX: Tensor) -> Tensor:
        return self.up(flat_NX)
