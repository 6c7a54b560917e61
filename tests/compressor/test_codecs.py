import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.codecs import TokenFormat, decode, encode
from pipelines.errors import InputError

VALUES = st.lists(
    st.lists(st.floats(-60_000, 60_000, width=16), min_size=3, max_size=3), max_size=9
)


@given(VALUES, st.integers(0, 4), st.integers(0, 4))
def test_what_is_encoded_is_decoded_sliced_or_chunked(
    values: list[list[float]], head: int, cut: int
) -> None:
    vectors = np.asarray(values, np.float16).reshape(-1, 3)
    column = encode(torch.from_numpy(vectors))
    np.testing.assert_array_equal(decode(column, 3), vectors)
    np.testing.assert_array_equal(decode(column.slice(head), 3), vectors[head:])
    chunked = pa.chunked_array([column.slice(0, cut), column.slice(cut)], pa.binary())
    np.testing.assert_array_equal(decode(chunked, 3), vectors)
    np.testing.assert_array_equal(
        decode(column.cast(pa.large_binary()).slice(head), 3), vectors[head:]
    )


def test_a_token_is_its_values_as_little_endian_float16() -> None:
    assert encode(torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)).to_pylist() == [
        b"\x00\x3c\x00\xc0"
    ]
    assert encode(np.array([[1.0]]), "float32").to_pylist() == [b"\x00\x00\x80\x3f"]


def test_decoding_copies_nothing() -> None:
    column = encode(np.ones((4, 2)))
    data = column.buffers()[2]
    assert decode(column, 2).ctypes.data == data.address


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([b"1234", None], pa.binary()), r"1 of 2 vectors are null; needed float16 x 2"),
        (pa.array([b"123456"], pa.binary()), r"float16 x 2 need 4 bytes each, got 6"),
        (pa.array([b"1234", b"12"], pa.binary()), r"need 4 bytes each, got 2, 4"),
        (pa.array([b"12", b"123456"], pa.binary()), r"need 4 bytes each, got 2, 6"),
        (pa.array([[1.0, 2.0]]), r"need a binary column, got list"),
    ],
)
def test_nulls_and_other_widths_are_refused(column: pa.Array, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(column, 2)


def test_vectors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="2 of 3 vectors are not finite as float16 x 2"):
        encode(np.array([[0.0, 1.0], [np.nan, 0.0], [1e9, 0.0]]))


def test_codecs_and_widths_unknown_are_refused() -> None:
    with pytest.raises(InputError, match="no codec called 'int3'; known: float16, float32"):
        TokenFormat("int3", 64)
    with pytest.raises(InputError, match="width must be from 1"):
        TokenFormat("float16", 0)
