"""A vocabulary gives each bucket that was seen its row, however it looks it up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.nn import embedding
from compressor.nn.embedding import Vocabulary

TABLES = ["item", "brand", "item"]
IDS = st.lists(st.tuples(*[st.integers(0, 9) | st.integers(0, 2**31 - 2)] * 3), max_size=12)


@pytest.mark.parametrize("dense", [0, 2, 2**20])
@given(seen=IDS, asked=IDS)
def test_rows_are_those_of_buckets_that_were_seen(
    dense: int, seen: list[tuple[int, ...]], asked: list[tuple[int, ...]]
) -> None:
    held, ids = (np.array(x, np.int32).reshape(-1, 3) % 10**6 for x in (seen, asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "DENSE", dense)
        vocabulary = Vocabulary.empty().extended(TABLES, held)
        rows = vocabulary.rows(TABLES, ids)
    found: dict[str, set[int]] = {table: set() for table in TABLES}
    for slot, table in enumerate(TABLES):
        found[table] |= {int(bucket) for bucket in held[:, slot] if bucket}
    order = [(table, bucket) for table in sorted(found) for bucket in sorted(found[table])]
    assert [(t, b) for t, buckets in vocabulary.buckets.items() for b in buckets] == order
    assert all(buckets.dtype == np.int32 for buckets in vocabulary.buckets.values())
    row_of = {name: row for row, name in enumerate(order, start=1)}
    expected = [[row_of.get((t, int(b)), 0) for t, b in zip(TABLES, r, strict=True)] for r in ids]
    assert rows.tolist() == expected
    assert rows.dtype == np.int32
