"""Rankers by name: (config, inputs, vocabulary, seed) -> a Ranker. A new paper adds a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from compressor.nn.embedding import Vocabulary
from downstream.configs import RankerConfig
from downstream.inputs import RankerInputs
from downstream.rankers.din import din
from downstream.rankers.transformer import transformer
from pipelines.errors import InputError

RankerFactory = Callable[[RankerConfig, RankerInputs, Vocabulary, int], nn.Module]

RANKERS: Mapping[str, RankerFactory] = {"din": din, "transformer": transformer}


def make_ranker(
    name: str, config: RankerConfig, inputs: RankerInputs, vocabulary: Vocabulary, seed: int = 0
) -> nn.Module:
    """A ranker with weights that the seed determines."""
    if name not in RANKERS:
        raise InputError(f"no ranker called {name!r}; known: {', '.join(RANKERS)}")
    return RANKERS[name](config, inputs, vocabulary, seed)
