"""Tokens in Spark: float16 bytes -> array<float> by Spark's own expressions, no Python worker.

In SQL, run CREATE_FUNCTION once per session (`spark.sql(CREATE_FUNCTION)`), then:

    SELECT user_id, event_time, iat_token(token) FROM delta.`LAKE/instance_tokens/DOMAIN`

For bulk reading on one machine `pipelines.token_format.decode` is far faster.
"""

from __future__ import annotations

from pyspark.sql import Column
from pyspark.sql import functions as F

# Bytes to hexadecimal once per token, halves with their two bytes in order, then arithmetic.
# A half of bits s eeeee mmmmmmmmmm is (-1)^s 2^(e-25) (1024+m), or 2^-24 m where e is 0; every step
# is exact in double, and so is the float it ends as. Written tokens are finite: e is 31 only in
# bytes that are no token, and reads as null.
EXPRESSION = """
transform(
  split(rtrim(regexp_replace(hex({token}), '(..)(..)', '$2$1 ')), ' '),
  text -> transform(
    array(cast(conv(text, 16, 10) AS int)),
    h -> cast(
      if(h >= 32768, -1, 1) * CASE (shiftright(h, 10) & 31)
        WHEN 0 THEN (h & 1023) * pow(2, -24)
        WHEN 31 THEN NULL
        ELSE (1024 + (h & 1023)) * pow(2, (shiftright(h, 10) & 31) - 25)
      END AS float))[0])
"""
CREATE_FUNCTION = (
    "CREATE OR REPLACE TEMPORARY FUNCTION iat_token(token BINARY) RETURNS ARRAY<FLOAT> "
    "COMMENT 'A float16 token as floats' RETURN " + EXPRESSION.format(token="token")
)


def token_array(column: str) -> Column:
    """The named binary column of float16 tokens as array<float>; null stays null."""
    quoted = "`" + column.replace("`", "``") + "`"
    return F.expr(EXPRESSION.format(token=quoted))
