"""DIN's activation unit: a query weighs each step of a sequence by a small MLP over the pair.

Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018. Here: over
[k, q, k * q, k - q], softmax with a learned null step (so that an empty history reads as itself).
Left out: Dice.

Shape legend: R requests, C candidates, L sequence length, D width, H hidden, X any flat width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HIDDEN = 16


class ActivationUnit(nn.Module):
    """Attention of candidates over one request's steps, without a copy of them for each; called as
    MultiHeadAttention is, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # k - q is linear in both, so its weights are those of k and q.
        self.key_hidden = nn.Linear(width, HIDDEN)
        self.query_hidden = nn.Linear(width, HIDDEN, bias=False)
        self.product_DH = nn.Parameter(torch.randn(width, HIDDEN) / width**0.5)
        self.out = nn.Linear(HIDDEN, 1)
        self.null = nn.Parameter(torch.zeros(width))

    def keys_values(self, source_RLD: Tensor) -> tuple[Tensor, Tensor]:
        """The steps, and their share of the hidden layer [R, L, H]: what no candidate changes."""
        return source_RLD, self.key_hidden(source_RLD)

    def attend(
        self, query_RCD: Tensor, keys_values: tuple[Tensor, Tensor], bias_R1CL: Tensor
    ) -> Tensor:
        """read_RCD; the bias is -inf at steps that are not there."""
        key_RLD, key_hidden_RLH = keys_values
        # (k * q) W for every pair is one product of the keys with W scaled by each query.
        num_requests, num_candidates = query_RCD.shape[:2]
        scaled_RDX = torch.einsum("rcd,dh->rdch", query_RCD, self.product_DH).flatten(2)
        product_RLCH = torch.bmm(key_RLD, scaled_RDX).unflatten(2, (num_candidates, HIDDEN))
        hidden_RLCH = product_RLCH + key_hidden_RLH[:, :, None]
        hidden_RLCH = torch.relu(hidden_RLCH + self.query_hidden(query_RCD)[:, None])
        logit_RLC = self.out(hidden_RLCH).squeeze(-1) + bias_R1CL.squeeze(1).transpose(1, 2)
        # The null step has logit 0: a history without anything alike is left unread.
        null_R1C = logit_RLC.new_zeros(num_requests, 1, num_candidates)
        weight_RLC = torch.softmax(torch.cat([null_R1C, logit_RLC], dim=1), dim=1)
        read_RCD = torch.bmm(weight_RLC[:, 1:].transpose(1, 2), key_RLD)
        return read_RCD + weight_RLC[:, 0, :, None] * self.null
