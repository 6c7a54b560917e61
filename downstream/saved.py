"""A trained ranker on disk: averaged weights and vocabulary (safetensors), configs (JSON)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, from_numpy, nn

from compressor.nn.embedding import Vocabulary
from compressor.training import checkpoint
from downstream.configs import RankerConfig
from downstream.data import RankerData
from downstream.inputs import RankerInputs
from downstream.rankers import make_ranker
from downstream.streaming import RankerTrainer
from pipelines.domain import Domain
from pipelines.errors import InputError


def save(
    folder: Path,
    name: str,
    trainer: RankerTrainer,
    data: RankerData,
    domain: Domain,
    manifest: Mapping[str, Any],
) -> None:
    """The weights that predict, with all that is needed to score with them; atomic."""
    with trainer.average:
        tensors = {f"model.{n}": t.clone() for n, t in trainer.model.state_dict().items()}
    tensors |= {f"vocabulary.{n}": from_numpy(b) for n, b in data.vocabulary.buckets.items()}
    meta = {
        "ranker": name,
        "domain": domain.name,
        "config": asdict(trainer.config),
        "num_match": data.inputs.num_match,
        "token_width": data.inputs.token_width,
        "manifest": dict(manifest),
    }
    checkpoint.save(folder, tensors, meta)


def load(folder: Path, domain: Domain) -> tuple[nn.Module, RankerConfig, Vocabulary]:
    """A saved ranker of this domain, ready to score."""
    tensors, meta = checkpoint.load(folder)
    if meta["domain"] != domain.name:
        raise InputError(
            f"the ranker in {folder} is of domain {meta['domain']!r}, not {domain.name!r}"
        )
    vocabulary = Vocabulary({n: t.numpy() for n, t in _below("vocabulary.", tensors).items()})
    config = RankerConfig(**meta["config"])
    inputs = RankerInputs.of(domain, num_match=meta["num_match"], token_width=meta["token_width"])
    model = make_ranker(meta["ranker"], config, inputs, vocabulary)
    try:
        model.load_state_dict(_below("model.", tensors))
    except RuntimeError as error:
        raise InputError(
            f"the ranker in {folder} does not fit the domain's features: {error}; train it again"
        ) from error
    return model.eval(), config, vocabulary


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
