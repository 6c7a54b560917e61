"""Domain files: those of the toolkit load, and every mistake is named with its field."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from jobs import ledger
from pipelines.domain import (
    Columns,
    Feature,
    Label,
    Limits,
    Negatives,
    Publishing,
    Source,
    check_columns,
    known_domains,
    load,
    parse,
)
from pipelines.errors import InputError

SHOP: dict[str, Any] = {
    "name": "shop",
    "source": {"path": "events.parquet"},
    "columns": {"user": "visitor", "item": "product", "time": "at"},
    "label": [{"name": "click", "column": "clicked"}],
    "feature": [
        {"name": "item", "column": "product", "side": "item", "buckets": 1024},
        {"name": "price", "column": "price", "kind": "number", "side": "item"},
        {"name": "hour", "derive": "hour"},
    ],
}


def changed(*path: str | int, to: Any) -> dict[str, Any]:
    """SHOP with the value at `path` replaced or added."""
    raw = copy.deepcopy(SHOP)
    place: Any = raw
    for key in path[:-1]:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
    place[path[-1]] = to
    return raw


@pytest.mark.parametrize("name", known_domains())
def test_every_domain_of_the_toolkit_loads_with_a_feature_for_its_item(name: str) -> None:
    domain = load(name)
    assert domain.name == name
    assert [f.name for f in domain.features if f.column == domain.columns.item] == ["item"]
    assert domain.source.reader


def test_the_toolkit_has_three_domains() -> None:
    assert known_domains() == ["grocery", "movielens", "synthetic"]


def test_grocery_keeps_the_receipt_out_of_predictions() -> None:
    after = {f.name for f in load("grocery").features if f.known == "after"}
    receipt = {"quantity", "sales_value", "retail_disc", "coupon_disc", "coupon_match_disc"}
    assert after == receipt | {"display", "mailer"}


def test_grocery_counts_matches_of_every_categorical_item_field() -> None:
    assert [f.name for f in load("grocery").match_features] == [
        "department",
        "brand",
        "brand_type",
        "category",
        "product_type",
        "package_size",
    ]


def test_a_complete_domain_has_the_columns_it_names_once() -> None:
    assert parse(SHOP).raw_columns == ("visitor", "product", "at", "clicked", "price")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed("nmae", to="x"), "no key 'nmae' (did you mean 'name'?)"),
        (changed("source", "fromat", to="csv"), "no key 'fromat' (did you mean 'format'?)"),
        (changed("columns", "usr", to="x"), "no key 'usr' (did you mean 'user'?)"),
        (
            changed("label", 0, "dealy", to="1d"),
            "'click' has no key 'dealy' (did you mean 'delay'?)",
        ),
        (
            changed("feature", 1, "bukets", to=8),
            "'price' has no key 'bukets' (did you mean 'buckets'?)",
        ),
        (
            changed("feature", 1, "kind", to="numbr"),
            "number, sequence; got 'numbr' (did you mean 'number'?)",
        ),
        (
            changed("source", "format", to="parket"),
            "one of parquet, csv, delta; got 'parket' (did you mean 'parquet'?)",
        ),
    ],
)
def test_a_typo_suggests_the_right_word(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse(raw)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (changed("name", to="My Shop"), "domain name"),
        (changed("source", to={}), "[source]"),
        (changed("source", "reader", to="grocery"), "[source]"),
        (changed("source", to="events.parquet"), "[source]"),
        (changed("source", "only", to=["MEAT"]), "[source] only must be a table of lists"),
        (changed("source", "only", to={"price": []}), "[source] only.price must be a list"),
        (changed("source", "only", to={"price": "9"}), "[source] only.price must be a list"),
        (changed("source", "only", to={"price": [0.5]}), "[source] only.price must be a list"),
        (changed("columns", "user", to=7), "[columns] user"),
        (changed("columns", "time_unit", to="minutes"), "columns.time_unit"),
        (changed("columns", to={"user": "u", "item": "i"}), "[columns] needs `time`"),
        (changed("label", to=[]), "[[label]]"),
        (changed("label", to={"name": "click"}), "[[label]]"),
        (changed("label", 0, "always", to=1), "label 'click'"),
        (changed("label", 0, to={"name": "buy", "always": 2}), "label 'buy': `always`"),
        (changed("label", 0, "delay", to="soon"), "label 'click' delay"),
        (changed("label", 0, "window", to="30 days"), "label 'click' window"),
        (changed("label", 0, "at_least", to="4"), "'click' at_least"),
        (changed("feature", to=[]), "[[feature]]"),
        (changed("feature", 0, "name", to="Item"), "feature name"),
        (changed("feature", 0, "side", to="product"), "feature 'item' side"),
        (changed("feature", 0, "known", to="later"), "feature 'item' known"),
        (changed("feature", 0, "buckets", to=2), "feature 'item': buckets"),
        (changed("feature", 0, "buckets", to=1.5), "'item' buckets"),
        (changed("feature", 0, "max_length", to=0), "feature 'item': max_length"),
        (changed("feature", 1, "scale", to=0), "feature 'price': scale"),
        (changed("feature", 1, "scale", to=float("nan")), "feature 'price': scale"),
        (changed("feature", 1, "transform", to="sqrt"), "feature 'price' transform"),
        (changed("feature", 1, "derive", to="hour"), "feature 'price'"),
        (changed("feature", 2, "derive", to="minute"), "feature 'hour' derive"),
        (changed("feature", 2, "name", to="price"), "feature 'price' is declared twice"),
        (changed("feature", 2, "table", to="item"), "features 'item' and 'hour'"),
        (changed("negatives", to={"per_positive": 0}), "negatives.per_positive"),
        (changed("negatives", to={"per_positive": True}), "per_positive"),
        (changed("tokens", to={"delay": "1 hour"}), "tokens.delay"),
        (changed("limits", to={"max_quarantined_share": 5}), "limits.max_quarantined_share"),
        (changed("limits", to={"latest": "31.1.2026"}), "limits.latest"),
        (changed("limits", to={"latest": "20260131"}), "limits.latest"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_bad_value_is_refused_with_its_field(raw: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as error:
        parse(raw)
    assert field in str(error.value)


@pytest.mark.parametrize("key", ["name", "source", "columns", "label", "feature"])
def test_a_missing_part_is_named(key: str) -> None:
    with pytest.raises(InputError, match=f"needs `{key}`, which is missing"):
        parse({k: v for k, v in SHOP.items() if k != key})


def test_a_column_that_the_events_lack_is_named_with_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r"'price' \(did you mean 'prices'\?\)"):
        check_columns(parse(SHOP), ["visitor", "product", "at", "clicked", "prices"])


def test_sampled_negatives_have_no_facts_of_the_event_at_their_request() -> None:
    raw = changed("feature", 1, "side", to="event") | {"negatives": {}}
    with pytest.raises(InputError, match="feature 'price': a sampled negative has no value"):
        parse(raw)


def test_an_unknown_domain_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'grocer' \(did you mean 'grocery'\?\)"):
        load("grocer")


def test_a_file_is_named_in_every_message(tmp_path: Path) -> None:
    file = tmp_path / "shop.toml"
    with pytest.raises(
        InputError, match=r"no domain file at .*shop.toml; `iat init DATA` drafts one"
    ):
        load(str(file))
    file.write_text("name = ")
    with pytest.raises(InputError, match=r"shop.toml is not valid TOML"):
        load(str(file))
    file.write_text('name = "shop"')
    with pytest.raises(InputError, match=r"shop.toml: the domain file needs `source`"):
        load(str(file))


DEPARTMENTS = Path(__file__).parents[2] / "pipelines" / "domains" / "departments"


@pytest.mark.parametrize("file", sorted(DEPARTMENTS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_department_is_the_grocery_log_s_domain_of_some_of_its_events(file: Path) -> None:
    domain, whole = load(str(file)), load("grocery")
    (kept,) = domain.source.only["department"]
    assert kept.startswith(file.stem.upper())
    given = {"name": domain.name, "title": domain.title, "source": domain.source}
    assert domain == replace(whole, **given)
    assert replace(domain.source, only={}) == whole.source


def test_only_is_a_matter_of_what_is_kept_not_of_how_it_is_written() -> None:
    first, second = (
        parse(changed("source", "only", to={"size": values})) for values in (["9", "10"], [10, 9])
    )
    assert first == second
    assert first.raw_columns[-1] == "size"
    with pytest.raises(InputError, match=r"'size' \(did you mean 'sizes'\?\)"):
        check_columns(first, ["visitor", "product", "at", "clicked", "price", "sizes"])


def test_a_file_that_does_not_use_only_keeps_the_hash_it_had() -> None:
    built_with = {"grocery": "784a5565cd3964c2", "movielens": "00c438e4a80fb961"}
    assert {name: ledger.config_of(load(name)) for name in built_with} == built_with
    one, other = (load(str(DEPARTMENTS / f"{name}.toml")) for name in ("meat", "deli"))
    moved = replace(other, name=one.name)
    assert ledger.config_of(one) != ledger.config_of(moved)


def test_a_base_is_the_file_with_what_is_said_in_its_place(tmp_path: Path) -> None:
    shop, below = tmp_path / "shop.toml", tmp_path / "below"
    below.mkdir()
    shop.write_text(
        """
        name = "shop"
        source = { format = "csv", path = "events.csv" }
        columns = { user = "u", item = "i", time = "t", time_unit = "s" }
        label = [{ name = "buy", always = 1 }]
        feature = [{ name = "item", column = "i", side = "item" }]
        """
    )
    own = below / "own.toml"
    own.write_text('base = "../shop.toml"\nname = "own"\ncolumns = { item = "brand" }')
    domain, base = load(str(own)), load(str(shop))
    assert (domain.name, domain.columns.item, domain.columns.user) == ("own", "brand", "u")
    assert (domain.source, domain.folder) == (base.source, base.folder)
    own.write_text('base = "../shop.toml"\nname = "own"\nsource = { path = "mine.csv" }')
    assert (load(str(own)).source.format, load(str(own)).folder) == ("csv", below)
    for text, message in (
        ('base = "../shop.toml"', "needs a `name` of its own"),
        ('name = "x"\nbase = "../shop"', "base must be the path of a domain file"),
        ('name = "x"\nbase = "shop.toml"', "no domain file at .*below/shop.toml"),
        (
            'name = "x"\nbase = "../shop.toml"\ncolumns = 7',
            r"own.toml: \[columns\] must be a table",
        ),
        ('name = "x"\nbase = "../shop.toml"\nlabels = 7', "no key 'labels'"),
    ):
        own.write_text(text)
        with pytest.raises(InputError, match=message):
            load(str(own))
    (below / "third.toml").write_text('base = "own.toml"\nname = "third"')
    with pytest.raises(InputError, match=r"base 'own.toml' has a `base` itself"):
        load(str(below / "third.toml"))


@pytest.mark.parametrize(
    "part",
    [Source, Columns, Label, Feature, Negatives, Publishing, Limits],
    ids=lambda c: c.__name__,
)
def test_every_key_is_documented(part: type) -> None:
    page = Path(__file__).parents[2] / "docs" / "domains.md"
    text = page.read_text()
    assert [f.name for f in fields(part) if f"`{f.name}`" not in text] == []


def test_the_example_of_the_documentation_loads(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "domains.md").read_text()
    (tmp_path / "shop.toml").write_text(page.split("```toml\n")[1].split("```")[0])
    assert load(str(tmp_path / "shop.toml")).name == "shop"
