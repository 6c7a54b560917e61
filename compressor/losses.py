"""Losses beside the main one: a token predicts its user's next request, and logged fields stay
decodable from it.

Both are softmax losses against the other rows of the batch; equal values never count as negatives
of each other.
Shape legend: K token rows, N rows, D bottleneck, E embedding width, F fields, M numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.batch import SourceBatch
from compressor.configs import SourceConfig
from compressor.data import StreamData
from compressor.source_model import SourceModel, SourceOutput
from pipelines.domain import Domain
from pipelines.features import FeatureLayout

MAX_CONTRASTED = 256


class SourceLosses(nn.Module):
    """Main loss and, where their weights are not zero, the two auxiliary ones."""

    def __init__(self, config: SourceConfig, domain: Domain) -> None:
        super().__init__()
        layout = FeatureLayout.of(domain, known="request")
        slots = layout.slots
        self.config = config
        self.item_slots = [slots[f.name].start for f in domain.side_features]
        self.field_slots = [slots[f.name].start for f in layout.categorical if not f.is_list]
        self.next_head = nn.Linear(config.bottleneck, config.embedding * len(self.item_slots))
        self.field_head = nn.Linear(config.bottleneck, config.embedding * len(self.field_slots))
        self.number_head = nn.Linear(config.bottleneck, max(1, len(layout.numbers)))

    def forward(
        self, model: SourceModel, data: StreamData, batch: SourceBatch, output: SourceOutput
    ) -> Tensor:
        loss = bce(output.logit_Q, batch.label_Q)
        if self.config.next_basket_weight and self.config.order == "user" and self.item_slots:
            loss = loss + self.config.next_basket_weight * self.next_request(
                model, data, batch, output
            )
        if self.config.decode_weight:
            loss = loss + self.config.decode_weight * self.decode(model, batch, output)
        return loss

    def next_request(
        self, model: SourceModel, data: StreamData, batch: SourceBatch, output: SourceOutput
    ) -> Tensor:
        """Each token against a random item of its user's next request, field by field."""
        chosen = _some((batch.next_row_K >= 0).nonzero().squeeze(1))
        rows_KF = data.tensors.rows_NS[batch.next_row_K[chosen]][:, self.item_slots]
        return self._contrast(model, self.next_head(output.token_KD[chosen]), rows_KF)

    def decode(self, model: SourceModel, batch: SourceBatch, output: SourceOutput) -> Tensor:
        """Each token against its own row's fields, and the numbers by squared error."""
        chosen = _some(torch.arange(len(batch.token_K), device=batch.token_K.device))
        own = batch.token_K[chosen]
        token_KD = output.token_KD[chosen]
        loss = token_KD.new_zeros(())
        if self.field_slots:
            loss = self._contrast(
                model, self.field_head(token_KD), batch.rows_NS[own][:, self.field_slots]
            )
        if batch.numbers_NM.shape[1]:
            wanted_KM = batch.numbers_NM[own].clamp(-10, 10)
            known_KM = ~wanted_KM.isnan()
            error_KM = (self.number_head(token_KD) - wanted_KM.nan_to_num()) * known_KM
            loss = loss + error_KM.square().sum() / known_KM.sum().clamp(min=1)
        return loss

    def _contrast(self, model: SourceModel, guess_KX: Tensor, rows_KF: Tensor) -> Tensor:
        """Mean over fields and rows of -log softmax(guess . value) among the batch's distinct
        values."""
        if not len(rows_KF):
            return guess_KX.sum() * 0
        guess_FKE = guess_KX.unflatten(1, (rows_KF.shape[1], -1)).transpose(0, 1)
        value_FKE = model.bank(rows_KF).transpose(0, 1)
        logit_FKK = torch.bmm(guess_FKE, value_FKE.transpose(1, 2))
        rows_FK = rows_KF.T
        is_same_FKK = rows_FK[:, :, None] == rows_FK[:, None, :]
        itself_KK = torch.eye(len(rows_KF), dtype=torch.bool, device=rows_KF.device)
        logit_FKK = logit_FKK.masked_fill(is_same_FKK & ~itself_KK, float("-inf"))
        loss_FK = F.cross_entropy(
            logit_FKK.transpose(1, 2),
            itself_KK.long().argmax(1).expand(len(rows_FK), -1),
            reduction="none",
        )
        known_FK = rows_FK > 0
        return (loss_FK * known_FK).sum() / known_FK.sum().clamp(min=1)


def bce(logit: Tensor, label: Tensor) -> Tensor:
    """Mean binary cross-entropy over rows whose label is known (not NaN)."""
    known = ~torch.isnan(label)
    loss = F.binary_cross_entropy_with_logits(logit, label.nan_to_num(), reduction="none")
    return (loss * known).sum() / known.sum().clamp(min=1)


def _some(index: Tensor) -> Tensor:
    """At most MAX_CONTRASTED of them, spread evenly."""
    step = max(1, -(-len(index) // MAX_CONTRASTED))
    return index[::step]
