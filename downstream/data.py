"""Ranker samples as device-resident tensors, and the batches cut from them.

All candidates of a request share user, moment and history, so a batch is R pieces of requests with
up to C candidates each, and its history is fetched R times. What depends on no model (match
features, vocabulary rows) is computed once for all rows.

Shape legend: n samples, G requests, P pieces, R pieces of a batch, C candidates, L sequence length,
S id slots, N events of the index, F side fields, K labels, M match features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from compressor.nn.embedding import Vocabulary
from downstream.batch import MAIN, HistorySequence, RankerBatch
from downstream.configs import RankerConfig
from downstream.inputs import RankerInputs
from downstream.match_features import MatchIndex
from downstream.samples import Array, Pieces, Samples
from downstream.transfer import SourceHistory, source_key
from downstream.user_index import IndexStore
from pipelines.domain import Domain
from pipelines.errors import InputError
from pipelines.features import FeatureLayout
from pipelines.splits import users_kept

DAY_US = 86_400_000_000


@dataclass(frozen=True, slots=True)
class RankerTensors:
    """What batches gather from, on the device; [n] tensors are ordered by request."""

    user_G: Tensor
    as_of_G: Tensor
    user_place_G: Tensor
    num_past_G: Tensor
    """The user's place among the index's, and the number of the user's events before the
    request."""
    ids_GS: Tensor
    numbers_GN: Tensor
    sample_n: Tensor
    item_n: Tensor
    ids_nS: Tensor
    numbers_nN: Tensor
    match_nM: Tensor
    label_n: Tensor
    label_time_n: Tensor
    side_NF: Tensor
    field_ids_NS: Tensor | None
    field_numbers_NN: Tensor | None


@dataclass(frozen=True, slots=True)
class Requests:
    """What samples ask of a store: found once a request, whatever its number of candidates."""

    pieces: Pieces
    user_G: Tensor
    as_of_G: Tensor
    user_place_G: Tensor
    num_past_G: Tensor

    @classmethod
    def of(cls, samples: Samples, store: IndexStore) -> Requests:
        pieces = Pieces.of(samples)
        first_G = pieces.order[pieces.request_start]
        user_G = torch.from_numpy(samples.user_id[first_G]).to(store.device)
        as_of_G = torch.from_numpy(samples.as_of_us[first_G]).to(store.device)
        return cls(pieces, user_G, as_of_G, *store.positions(user_G, as_of_G))

    def of_samples(self) -> tuple[Tensor, Tensor]:
        """(user_n, num_n) The positions of each sample's request, samples as they were given."""
        order, start = self.pieces.order, self.pieces.request_start
        request = np.empty(len(order), np.int64)
        request[order] = np.repeat(np.arange(len(start)), np.diff(np.append(start, len(order))))
        request_n = torch.from_numpy(request).to(self.user_G.device)
        return self.user_place_G[request_n], self.num_past_G[request_n]


@dataclass(frozen=True)
class RankerData:
    """Samples by request on a device, with the store their histories are fetched from."""

    inputs: RankerInputs
    vocabulary: Vocabulary
    samples: Samples
    store: IndexStore
    pieces: Pieces
    piece_day: Array
    """[P] Days since 1970 of the request, ascending."""
    delay_us: int
    """From the midnight after an event to its publication (what its token would wait)."""
    tensors: RankerTensors
    sources: tuple[SourceHistory, ...] = ()
    """Other domains' tokens, which every batch holds beside the own past."""

    @classmethod
    def load(
        cls,
        rows: pa.Table,
        domain: Domain,
        store: IndexStore,
        *,
        fields: bool = False,
        user_share: float = 1.0,
        user_seed: int = 0,
    ) -> RankerData:
        """From rows of `ranker_samples`, on the store's device, match features computed here.

        `fields`: for the end-to-end arm too; the index must then hold all logged fields.
        """
        if user_share < 1:
            kept = users_kept(rows.column("user_id").to_numpy(), user_share, user_seed)
            rows = rows.filter(pa.array(kept))
        samples = Samples.of(rows, domain)
        requests = Requests.of(samples, store)
        match_nM = match_of(
            samples, RankerInputs.of(domain, num_match=0), store, positions=requests.of_samples()
        )
        inputs = RankerInputs.of(domain, num_match=match_nM.shape[1], token_width=store.width)
        return cls.from_arrays(
            inputs, samples, store, match_nM, delay_us=domain.tokens.delay_us, fields=fields,
            requests=requests,
        )  # fmt: skip

    @classmethod
    def from_arrays(
        cls,
        inputs: RankerInputs,
        samples: Samples,
        store: IndexStore,
        match_nM: Tensor,
        *,
        delay_us: int = 0,
        fields: bool = False,
        vocabulary: Vocabulary | None = None,
        requests: Requests | None = None,
    ) -> RankerData:
        """On the store's device; the vocabulary (None: of all samples and of the whole index) gives
        each id its row; `requests`: of these samples and this store, where they are known."""
        index = store.index.arrays
        if fields and "ids" not in index:
            raise InputError("the index holds no logged fields; build it with fields=True")
        side_NF = _side_ids(inputs, store)
        if vocabulary is None:
            vocabulary = vocabulary_of(inputs, samples, store, fields=fields)
        requests = requests or Requests.of(samples, store)
        pieces = requests.pieces
        order, first_G = pieces.order, pieces.order[pieces.request_start]

        def tensor(values: Array) -> Tensor:
            return torch.from_numpy(np.array(values)).to(store.device)

        def rows_of(layout: FeatureLayout, ids: Array) -> Tensor:
            return tensor(vocabulary.rows(layout.slot_tables, ids))

        tensors = RankerTensors(
            user_G=requests.user_G,
            as_of_G=requests.as_of_G,
            user_place_G=requests.user_place_G,
            num_past_G=requests.num_past_G,
            ids_GS=rows_of(inputs.request, samples.request.ids[first_G]),
            numbers_GN=tensor(samples.request.numbers[first_G]),
            sample_n=tensor(order),
            item_n=tensor(samples.item_id[order]),
            ids_nS=rows_of(inputs.candidate, samples.candidate.ids[order]),
            numbers_nN=tensor(samples.candidate.numbers[order]),
            match_nM=match_nM.to(store.device)[tensor(order)],
            label_n=tensor(samples.label[order]),
            label_time_n=tensor(samples.label_time_us[order]),
            side_NF=rows_of(inputs.side, side_NF),
            field_ids_NS=rows_of(inputs.fields, np.asarray(index["ids"])) if fields else None,
            field_numbers_NN=tensor(index["numbers"]) if fields else None,
        )
        piece_day = samples.as_of_us[first_G][pieces.request] // DAY_US
        return cls(inputs, vocabulary, samples, store, pieces, piece_day, delay_us, tensors)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def device(self) -> torch.device:
        return self.tensors.sample_n.device

    def with_store(self, store: IndexStore) -> RankerData:
        """The same samples beside another line's tokens of the same histories."""
        if store.num_rows != len(self.tensors.side_NF):
            raise InputError(
                f"the store has {store.num_rows} rows and these samples were loaded with an index "
                f"of {len(self.tensors.side_NF)}; load them again"
            )
        return replace(self, store=store, inputs=replace(self.inputs, token_width=store.width))

    def with_sources(self, sources: Sequence[SourceHistory]) -> RankerData:
        """The same samples beside tokens of these domains."""
        told = tuple(source.inputs for source in sources)
        inputs = replace(self.inputs, sources=told, num_domains=1 + len(told))
        return replace(self, sources=tuple(sources), inputs=inputs)

    def of_days(self, first_day: int, last_day: int) -> Array:
        """Pieces of the days [first_day, last_day) since 1970, in order."""
        return np.arange(*np.searchsorted(self.piece_day, [first_day, last_day]))

    @property
    def piece_size(self) -> int:
        """Candidates of the longest piece."""
        return int(self.pieces.size.max(initial=1))

    @cached_property
    def item_row_n(self) -> Tensor:
        """The row of each sample's item token in the store, as of its request."""
        t = self.tensors
        as_of_us = torch.from_numpy(self.samples.as_of_us[self.pieces.order])
        return self.store.item_rows(t.item_n, as_of_us)

    def batch(
        self, pieces: Array, config: RankerConfig, *, known_before_us: int | None = None
    ) -> RankerBatch:
        """The batch of some pieces, holding what `config` reads.

        Labels known at or after `known_before_us` are unknown.
        """
        (piece_3R,) = self.described([pieces], len(pieces))
        num_candidates = int(self.pieces.size[pieces].max(initial=1))
        return self.gather(piece_3R, num_candidates, config, known_before_us)

    def described(self, groups: Sequence[Array], num_pieces: int) -> Tensor:
        """[T, 3, R] size, first place and request of the pieces of T batches, on the device: all
        that the host knows of them, in one copy. Batches are filled up with pieces of nothing."""
        found = np.zeros((len(groups), 3, num_pieces), np.int64)
        for group, piece_3R in zip(groups, found, strict=True):
            p = self.pieces
            piece_3R[:, : len(group)] = p.size[group], p.start[group], p.request[group]
        return torch.from_numpy(found).to(self.device, non_blocking=True)

    def gather(
        self,
        piece_3R: Tensor,
        num_candidates: int,
        config: RankerConfig,
        known_before_us: int | Tensor | None = None,
    ) -> RankerBatch:
        """The batch of pieces so described: its shapes are given and the device is not asked."""
        t = self.tensors
        size_R, start_R, request_R = piece_3R
        step_C = torch.arange(num_candidates, device=self.device)
        mask_RC = step_C < size_R[:, None]
        place_RC = torch.where(mask_RC, start_R[:, None] + step_C, start_R[:, None])
        is_unknown_RC = ~mask_RC
        if known_before_us is not None:
            is_unknown_RC = is_unknown_RC | (t.label_time_n[place_RC] >= known_before_us)
        item_token_RCD = item_mask_RC = None
        if config.item_tokens:
            items = self.store.items_at(self.item_row_n[place_RC].flatten())
            item_token_RCD = items.token_BD.float().unflatten(0, place_RC.shape)
            item_mask_RC = items.mask_B.unflatten(0, place_RC.shape)
        is_read = config.history or config.branch != "none"
        histories = {MAIN: self._history(request_R, config)} if is_read else {}
        for domain, source in enumerate(self.sources, start=1):
            histories[source_key(source.name)] = source.sequence(
                request_R, t.as_of_G[request_R], config.history_length, domain=domain
            )
        return RankerBatch(
            ids_RS=t.ids_GS[request_R],
            numbers_RN=t.numbers_GN[request_R],
            histories=histories,
            ids_RCS=t.ids_nS[place_RC],
            numbers_RCN=t.numbers_nN[place_RC],
            match_RCM=t.match_nM[place_RC],
            mask_RC=mask_RC,
            label_RC=t.label_n[place_RC].masked_fill(is_unknown_RC, float("nan")),
            user_R=t.user_G[request_R],
            sample_RC=t.sample_n[place_RC].masked_fill(~mask_RC, -1),
            item_token_RCD=item_token_RCD,
            item_token_mask_RC=item_mask_RC,
        )

    def _history(self, request_R: Tensor, config: RankerConfig) -> HistorySequence:
        t, store = self.tensors, self.store
        as_of_R = t.as_of_G[request_R]
        labels = [name for name in store.side if name.startswith("label_")]
        has_tokens = config.branch == "tokens"
        past = store.past(
            t.user_place_G[request_R], t.num_past_G[request_R], as_of_R, config.history_length,
            side=labels, has_tokens=has_tokens, dtype=torch.float32,
        )  # fmt: skip
        row_RL, mask_RL = past.row_BL, past.mask_BL
        sequence = HistorySequence(
            ids_RLF=store.rows_at(t.side_NF, row_RL),
            gap_s_RL=past.gap_s_BL,
            label_RLK=torch.stack([past.side[name] for name in labels], dim=-1),
            mask_RL=mask_RL,
            token_RLD=past.token_BLD if has_tokens else None,
            token_mask_RL=past.token_mask_BL if has_tokens else None,
        )
        if config.branch == "fields":
            ids_NS, numbers_NN = t.field_ids_NS, t.field_numbers_NN
            if ids_NS is None or numbers_NN is None:
                raise InputError("this arm reads all logged fields; load the samples with them")
            row_RL = row_RL.clamp(min=0)
            is_there_RL = self._published(row_RL, mask_RL, as_of_R)
            is_hidden_RL1 = ~is_there_RL[..., None]
            return sequence._replace(
                field_ids_RLS=ids_NS[row_RL].masked_fill_(is_hidden_RL1, 0),
                field_numbers_RLN=numbers_NN[row_RL].masked_fill_(is_hidden_RL1, float("nan")),
                field_mask_RL=is_there_RL,
            )
        return sequence

    def _published(self, row_RL: Tensor, mask_RL: Tensor, as_of_R: Tensor) -> Tensor:
        """Where an event's token could have been read by then: [R, L]."""
        time_RL = self.store.columns["event_time_us"][row_RL]
        available_RL = (time_RL // DAY_US + 1) * DAY_US + self.delay_us
        return mask_RL & (available_RL < as_of_R[:, None])


def vocabulary_of(
    inputs: RankerInputs,
    samples: Samples,
    store: IndexStore,
    *,
    fields: bool = False,
    older: Vocabulary | None = None,
    before_us: int | None = None,
) -> Vocabulary:
    """`older` with every id of the samples and of the index's events (before a moment)."""
    index, side_NF = store.index.arrays, _side_ids(inputs, store)
    known = [(inputs.request, samples.request.ids), (inputs.candidate, samples.candidate.ids)]
    events = slice(None) if store.index.is_compact else store.index.rows
    if before_us is not None:
        rows = store.index.rows
        events = rows[index["event_time_us"][rows] < before_us]
    known.append((inputs.side, side_NF[events]))
    known += [(inputs.fields, np.asarray(index["ids"])[events])] if fields else []
    vocabulary = older or Vocabulary.empty()
    for layout, ids in known:
        vocabulary = vocabulary.extended(layout.slot_tables, ids)
    return vocabulary


def _side_ids(inputs: RankerInputs, store: IndexStore) -> Array:
    """[N, F] The events' side fields, as hash buckets."""
    found = [store.index.arrays[f.stream_column] for f in inputs.side.features]
    return np.stack(found, 1) if found else np.zeros((store.num_rows, 0), np.int32)


def match_of(
    samples: Samples,
    inputs: RankerInputs,
    store: IndexStore,
    index: MatchIndex | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[n, M] match features of the samples' candidates, on the store's device; `index`: the
    store's, and `positions`: the samples' in it, where they are there already."""
    slots = inputs.candidate.slots
    side = {
        f.stream_column: torch.from_numpy(samples.candidate.ids[:, slots[f.name].start])
        for f in inputs.side.features
    }
    user_id, as_of_us = torch.from_numpy(samples.user_id), torch.from_numpy(samples.as_of_us)
    index = index or MatchIndex.build(store)
    return index.features(user_id, as_of_us, torch.from_numpy(samples.item_id), side, positions)


def with_shuffled_tokens(store: IndexStore, seed: int) -> IndexStore:
    """The control in which a day's tokens are dealt out again among that day's events.

    Item tokens are none: they would still be those of the item.
    """
    rows = store.index.rows
    available = store.available_us_N.cpu().numpy()[rows]
    day = store.columns["event_time_us"].cpu().numpy()[rows] // DAY_US
    noise = np.random.default_rng(seed).permutation(len(day))
    # Dealt within equal (day, available): who reads when is untouched, what is read is not.
    taken, given = np.lexsort((available, day)), np.lexsort((noise, available, day))
    source = np.arange(store.num_rows)
    source[rows[taken]] = rows[given]
    place = torch.from_numpy(source).to(store.token_ND.device)
    return store.with_tokens(store.token_ND[place], store.available_us_N)
