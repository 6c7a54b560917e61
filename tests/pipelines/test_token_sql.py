import numpy as np
from pyspark.sql import SparkSession

from pipelines import token_format
from pipelines.token_sql import CREATE_FUNCTION, token_array


def test_every_half_is_decoded_to_the_bit_in_sql_and_in_python(spark: SparkSession) -> None:
    halves = np.arange(65_536, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)].reshape(-1, 32)
    encoded = token_format.encode(finite).to_pylist()
    rows = [(i, bytearray(token)) for i, token in enumerate(encoded)]
    frame = spark.createDataFrame([*rows, (-1, None)], "k int, token binary")
    frame.createOrReplaceTempView("tokens")
    spark.sql(CREATE_FUNCTION)
    in_sql = spark.sql("SELECT k, iat_token(token) FROM tokens")
    for found in (in_sql, frame.select("k", token_array("token"))):
        decoded = dict(map(tuple, found.collect()))
        assert decoded.pop(-1) is None
        values = np.array([decoded[i] for i in range(len(finite))], np.float32)
        np.testing.assert_array_equal(values.view(np.uint32), finite.astype("f4").view(np.uint32))


def test_what_is_not_finite_is_null(spark: SparkSession) -> None:
    bits = np.array([0x7C00, 0xFC00, 0x7E00, 0x3C00], "<u2").tobytes()
    frame = spark.createDataFrame([(bytearray(bits),)], "token binary")
    assert frame.select(token_array("token")).first()[0] == [None, None, None, 1.0]  # type: ignore[index]
