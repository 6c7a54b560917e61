"""A first domain file from an event log: every guess carries what was seen, and gaps are named."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from pipelines.column_facts import Facts, Log
from pipelines.domain import NAME
from pipelines.draft_roles import Roles, guess_roles, is_key, slug, time_unit
from pipelines.errors import InputError

LEARNED_LATER = re.compile(
    r"(\w*_)?(watch|dwell|duration|paid|spent|sales|revenue|refund|play_?time|quantity|rating)(_\w*)?"
)
AMOUNT = re.compile(
    r"(\w*_)?(price|amount|cost|value|discount|count|score|length|duration|seconds|total)(_\w*)?"
    r"|(num|n)_\w+"
)
SAME = 0.98
"""Rows of one item (user, request) that agree on a column at least as often make it theirs."""
MOST_BUCKETS = 1 << 24


@dataclass(kw_only=True)
class Draft:
    """The text of a domain file, and what its owner must still say."""

    text: str = ""
    missing: list[str] = field(default_factory=list)
    """Keys that no column suggested; the file does not load before they are filled in."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Column -> why it became no feature."""
    num_features: int = 0


def draft(log: Log, *, name: str, path: str) -> Draft:
    """The domain file of a log, with `path` as its source.

    Raises:
        InputError: the name is no name.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            "a domain name must be lower-case letters, digits and _, starting with a letter; "
            f"got {name!r}: pass --name"
        )
    facts = log.facts()
    roles = guess_roles(facts)
    found = Draft(missing=[k for k in ("user", "item", "time") if not getattr(roles, k)])
    sections = [
        _heading(log, name, path), _columns(log, facts, roles), *_labels(log, facts, roles),
        *_features(log, facts, roles, found),
    ]  # fmt: skip
    if found.left_out:
        why = [f"# {_line(column)}: {reason}" for column, reason in found.left_out.items()]
        sections.append("\n".join(["# Left out:", *why]))
    found.text = "\n\n".join(sections) + "\n"
    return found


def _heading(log: Log, name: str, path: str) -> str:
    return "\n".join([
        f"# A draft from {log.num_rows:,} rows: read every comment and correct what is wrong.",
        "# What every key means: docs/domains.md",
        f"name = {_quoted(name)}",
        "",
        "[source]",
        f"format = {_quoted(log.format)}",
        f"path = {_quoted(path)}",
    ])  # fmt: skip


def _columns(log: Log, facts: Mapping[str, Facts], roles: Roles) -> str:
    lines = ["[columns]"]
    for key, options in (("user", is_key), ("item", is_key), ("time", time_unit)):
        column = getattr(roles, key)
        if column:
            lines.append(f"{key} = {_quoted(column)}  # {_seen(facts[column])}")
            continue
        fitting = ", ".join(n for n, f in facts.items() if options(f)) or "none has a fitting type"
        lines.append(f'# {key} = ""  # FILL IN: no name told; candidates: {_line(fitting)}')
    if roles.request:
        per_request = log.num_rows / max(facts[roles.request].distinct, 1)
        lines.append(f"request = {_quoted(roles.request)}  # {per_request:.1f} rows each")
    else:
        lines.append("# no request column: a user's rows of one instant are one request")
    if roles.time:
        # In a CSV file a date is text, however well it reads.
        unit = time_unit(facts[roles.time])
        unit = "iso" if log.format == "csv" and unit == "timestamp" else unit
        lines.append(f"time_unit = {_quoted(str(unit))}")
    return "\n".join(lines)


def _labels(log: Log, facts: Mapping[str, Facts], roles: Roles) -> Iterator[str]:
    for column in roles.labels:
        lines = ["[[label]]", f"name = {_quoted(_label_name(column))}"]
        seen = facts[column]
        lines.append(f"column = {_quoted(column)}  # {_seen(seen)}")
        if not seen.is_binary:
            least = log.highest_with_share(column, 0.6)
            lines.append(f"at_least = {least:g}  # at most 6 in 10 rows reach it: the right mark?")
        if column in roles.label_times:
            lines.append(f"time_column = {_quoted(roles.label_times[column])}")
        else:
            lines.append('delay = "0s"  # known at once? else say how long after the event')
        yield "\n".join(lines)
    if not roles.labels:
        yield "\n".join([
            "# No column looks like a label, so every row is taken for a positive, and negatives",
            "# are sampled. If a column is the label, name it here and remove [negatives].",
            "[[label]]", 'name = "taken"', "always = 1", "", "[negatives]", "per_positive = 4",
        ])  # fmt: skip


def _features(log: Log, facts: Mapping[str, Facts], roles: Roles, found: Draft) -> Iterator[str]:
    taken = {"item"}
    keyed = [(roles.item, "item", "item"), (roles.user, "user", "user")]
    for column, name, side in keyed:
        if column:
            taken.add(name)
            found.num_features += 1
            yield _feature(facts[column], name, side, note="")
    busy = {roles.user, roles.item, roles.time, roles.request, *roles.labels}
    busy |= set(roles.label_times.values())
    rest = [f for n, f in facts.items() if n not in busy]
    for seen in tqdm(rest, desc="columns", unit="column", delay=2):
        reason = _unfit(seen, facts, roles, log.num_rows)
        side, note = _side(log, seen.name, roles) if not reason else ("", "")
        if not reason and side == "item" and seen.is_text and not seen.num_parts:
            of_item = seen.distinct / max(facts[roles.item].distinct, 1)
            reason = "a name of the item: nearly every item has its own" if of_item > 0.9 else ""
        if reason:
            found.left_out[seen.name] = reason
            continue
        name = _name(seen.name)
        while name in taken:
            name += "_2"
        taken.add(name)
        # A sampled negative has no value for a fact of the event, so none may be known before it.
        sounds_late = LEARNED_LATER.fullmatch(slug(seen.name)) is not None
        is_later = side == "event" and (sounds_late or not roles.labels)
        found.num_features += 1
        yield _feature(seen, name, side, note=note, is_later=is_later)
    for part in ("hour", "weekday"):
        if part not in taken:
            found.num_features += 1
            derived = f'derive = "{part}"  # of the event time, UTC'
            yield f'[[feature]]\nname = "{part}"\n{derived}\nbuckets = 256'


def _unfit(seen: Facts, facts: Mapping[str, Facts], roles: Roles, num_rows: int) -> str:
    """Why a column cannot be a feature; empty if it can."""
    if not seen.is_readable:
        return f"{seen.type.split('(')[0]} is no single value or list"
    if seen.distinct <= 1:
        return "one value only"
    if time_unit(seen) is not None:
        return "a time; only the event time is split into features"
    if not seen.is_number and not seen.num_parts and seen.distinct > 0.9 * num_rows > 18:
        return "nearly every row has its own value"
    if seen.is_text and not seen.num_parts and seen.mean_length > 60:
        return f"free text, {seen.mean_length:.0f} characters long"
    return ""


def _side(log: Log, column: str, roles: Roles) -> tuple[str, str]:
    """Whose the column is, by who agrees on it, and the words for it."""
    best, note = ("event", 0.0), "differs within users, items and requests"
    for side, by in (("item", roles.item), ("user", roles.user), ("context", roles.request)):
        if not by:
            continue
        alike, anyhow = log.agreement(column, by)
        # What is nearly constant agrees within anything.
        if alike >= SAME and alike > anyhow + 0.5 * (1 - anyhow) and alike > best[1]:
            best, note = (side, alike), f"the same in {alike:.1%} of rows of one {by}"
    return best[0], note


def _feature(seen: Facts, name: str, side: str, *, note: str, is_later: bool = False) -> str:
    comment = "; ".join(part for part in (_seen(seen), note) if part)
    lines = [
        "[[feature]]",
        f"name = {_quoted(name)}",
        f"column = {_quoted(seen.name)}  # {comment}",
    ]
    kind = _kind(seen)
    if kind != "category":
        lines.append(f'kind = "{kind}"')
    lines.append(f'side = "{side}"')
    if is_later:
        lines.append('known = "after"  # a fact of the event: is it known at the request?')
    if kind == "number":
        return "\n".join([*lines, *_scaling(seen)])
    values = seen.num_parts or seen.distinct
    if kind == "multi-category":
        lines.append(f"max_length = {min(max(seen.most_parts, 1), 256)}")
        if seen.separator not in ("", "|"):
            lines.append(f"separator = {_quoted(seen.separator)}")
    return "\n".join([*lines, f"buckets = {num_buckets(values)}"])


def num_buckets(num_values: int) -> int:
    """The power of two of at least four times the values, from 16 to MOST_BUCKETS."""
    return min(max(1 << (4 * num_values - 1).bit_length(), 16), MOST_BUCKETS)


def _kind(seen: Facts) -> str:
    if seen.num_parts:
        return "multi-category"
    if not seen.is_number or slug(seen.name).endswith(("id", "code", "key", "type")):
        return "category"
    if AMOUNT.fullmatch(slug(seen.name)) and not seen.is_binary:
        return "number"
    return "category" if seen.is_code else "number"


def _scaling(seen: Facts) -> list[str]:
    """Transform, centre and scale from quantiles: most values land within -2 and 2."""
    low, middle, high, top = seen.quantiles
    lines = []
    if seen.is_skewed:
        low, middle, high, top = (math.log1p(q) for q in (low, middle, high, top))
        lines.append('transform = "log"  # a long tail of large values')
    spread = (high - low) / 3.29 or (top - low) / 3.29 or 1.0
    return [*lines, f"center = {middle:.4g}", f"scale = {spread:.4g}"]


def _seen(seen: Facts) -> str:
    """What the column holds, in a few words."""
    words = [f"{seen.num_parts or seen.distinct:,} values"]
    if seen.num_parts and seen.separator:
        words.append(f"several a row, separated by {seen.separator!r}")
    if seen.minimum is not None:
        words.append(f"{_short(seen.minimum)} to {_short(seen.maximum)}")
    if seen.quantiles and _kind(seen) == "number":
        words.append(f"median {_short(seen.quantiles[1])}")
    if seen.missing_share:
        words.append(f"missing in {seen.missing_share:.1%}")
    return ", ".join(words)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _line(str(value))


def _line(text: str) -> str:
    """On one line, so that it cannot end a comment; what cannot be printed is a space."""
    return "".join(c if c.isprintable() else " " for c in text)


def _label_name(column: str) -> str:
    return _name(re.sub(r"^(label|is|has)_(?=.)", "", slug(column)))


def _name(column: str) -> str:
    found = slug(column)[:60]
    return found if NAME.fullmatch(found) else f"f_{found}".rstrip("_")


def _quoted(text: str) -> str:
    """A TOML string: JSON's are, but for one sign."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
