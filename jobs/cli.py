"""`iat`: one sub-command per job, the same words and exit codes everywhere."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import inspect
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from pipelines.errors import CheckFailedError, InputError, RetryableError
from pipelines.places import shown_in

COMMANDS: Mapping[str, tuple[str, str]] = {
    "quickstart": (
        "jobs.quickstart",
        "the whole chain on a real log: tables, compressors, rankers, leak proof, report",
    ),
    "arrived": ("jobs.arrived", "is a day in the raw log? exit 1: not yet"),
    "init": ("jobs.init", "draft a domain file from a Parquet, CSV or Delta source"),
    "build": (
        "jobs.build",
        "the next three in one Spark session",
    ),
    "build-instances": (
        "jobs.build_instances",
        "raw events -> instances; what breaks a rule goes to quarantine",
    ),
    "build-streams": (
        "jobs.build_streams",
        "instances -> temporal-order and user-order streams, histories",
    ),
    "build-samples": (
        "jobs.build_samples",
        "instances -> ranker samples, pointers into histories",
    ),
    "status": ("jobs.status", "a calendar of days: right, missing, stale; quarantined share"),
    "backfill": (
        "jobs.backfill",
        "find missing and stale days, say what would be written, write it",
    ),
    "check": (
        "jobs.check_tables",
        "expectations of every table: keys, order, labels, tokens, the week before",
    ),
    "lineage": (
        "jobs.lineage",
        "what a table or a day was made of: versions, job, run, domain file, code",
    ),
    "train-compressor": (
        "jobs.train_compressor",
        "train a source model; streaming: walk the days and write their tokens",
    ),
    "walk-compressor": (
        "jobs.walk_compressor",
        "bring the approved line up to a day: what a daily run calls, with a gate",
    ),
    "approve": ("jobs.approve", "approve a compressor line, if it is not worse than the present"),
    "rollback": ("jobs.rollback", "approve the line again that was approved before"),
    "write-tokens": ("jobs.write_tokens", "tokens of some days by a trained version"),
    "index": ("jobs.index", "keep a user index on disk: built once, extended by changed days"),
    "materialize": (
        "jobs.materialize",
        "ranker samples with their users' pasts written out: wide Parquet",
    ),
    "fetch": ("jobs.fetch", "a user's newest tokens strictly before a moment"),
    "train-ranker": (
        "jobs.train_ranker",
        "train and predict one arm of a ranker over fetched tokens",
    ),
    "walk-ranker": (
        "jobs.walk_ranker",
        "go on with a ranker by the days that have come: predict, report, train",
    ),
    "forget": (
        "jobs.forget",
        "erase users: from every table, index and raw sample; they do not come back",
    ),
    "vacuum": (
        "jobs.vacuum",
        "remove files that no table and no manifest needs, and say what that freed",
    ),
    "compare": (
        "jobs.compare",
        "all arms over several seeds, with every control: for a GPU; resumable",
    ),
    "transfer": (
        "jobs.transfer",
        "a target's ranker beside tokens of other domains that share its users; leak proof",
    ),
    "transfer-report": (
        "jobs.transfer_report",
        "one table of all transfer runs below a folder: intervals, coverage, proof",
    ),
    "evaluate": (
        "jobs.evaluate",
        "AUC, GAUC, log loss and normalised entropy of predictions, with intervals",
    ),
    "verify": (
        "jobs.verify",
        "leak proof: an SQL oracle, a disturbed future, fair negatives; signed report",
    ),
}
USAGE = """usage: iat COMMAND [flags]      iat COMMAND --help for the flags of one

{commands}

Days are UTC and half open: --start DAY --end DAY. --domain takes a name ({domains}) or a FILE.toml.
--json FILE writes what was printed for people as JSON. Logs go to stderr.
Exit codes: 0 done, 1 a check failed, 2 wrong input (one clear message), 3 a fault worth
retrying."""

JSON_KEYS: Mapping[str, str] = {
    "quickstart": "domain, protocol, created_for, arms, lines, tokens, settings, lake, checks, "
    "timings (jobs/report.py says what each holds); --full: streaming, frozen, each as compare's",
    "arrived": "domain, days, arrived, latest",
    "init": "file, name, num_features, fill_in, left_out",
    "build": "build-instances, build-streams, build-samples: each command's own",
    "build-instances": "domain, source, days, events, kept, quarantined, rules, forgotten, "
    "instances, sampled, empty_days, version, changed_days",
    "build-streams": "domain, days, input_versions, rows (by table)",
    "build-samples": "domain, days, input_versions, rows, sampled",
    "status": "domain, days, tables (by group and line: right, again (reason by day)), quarantined "
    "(by day)",
    "backfill": "domain, days, steps (days, start, end, why), without_instances, without_streams, "
    "estimate (rows, bytes, seconds), failed (by days)",
    "check": "domain, days, tables (versions), limits, passed, failed, warnings, findings (table, "
    "day, line, level, rule, says, count, rows (some of them))",
    "lineage": "table, day, roots (table, version), commits (table, version, days, job, run, code, "
    "config, domain, line, compressor_version, source, made_of (table, version))",
    "train-compressor": "line, version, days, rows, tokens, width, source_auc, by_day "
    "(streaming) or loss (frozen)",
    "walk-compressor": "domain, line, first, days, walked, end, refused (why, by day), waits",
    "approve": "domain, line, days, approved, earlier, evidence (rows, users, difference)",
    "rollback": "domain, line, earlier",
    "write-tokens": "line, version, days, width, tokens",
    "index": "domain, index, was (missing, there, built, extended, unchanged), rows, lines, tables "
    "(versions)",
    "materialize": "domain, line, days, length, codec, width, input_versions, rows",
    "fetch": "domain, line, user, user_id, as_of, is_known, token_width, tables, events",
    "train-ranker": "domain, ranker, arm, line, protocol, seed, days, num_samples, num_predicted, "
    "num_labelled, metrics (value, low, high), trained_rows, steps, parameters, seconds, "
    "rows_per_s, config, training, input_versions, manifest, user_share, user_seed",
    "walk-ranker": "domain, ranker, arm, line, folder, days, metrics (by day), week, next_day, "
    "waits (why the next day does)",
    "compare": "domain, protocol, ranker, seeds, user_share, samples, days, input_versions, "
    "manifest, digest, lines, windows (rows by window), settings, missing, seconds",
    "forget": "domain, users, rows (by table), item_token_days (by line), compressors, "
    "rankers (folder by name), indexes, old_statistics",
    "vacuum": "tables (by name: files, bytes), kept (by table and manifest), not_kept (by table), "
    "released, retention_hours",
    "transfer": "target, line, ranker, seeds, sources (line by domain), arms, days, runs (target, "
    "ranker, seed, protocol, days, line, sources, manifest, digest, coverage, proof, arms)",
    "transfer-report": "out, window, unfinished, transfers (target, ranker, line, sources, days, "
    "protocol, seeds, num_rows, num_users, arms, beside_shuffled, coverage, same_budget, proof)",
    "evaluate": "num_rows, num_users, base, arms, window",
    "verify": "domain, line, days, settings, tables, checks, passed, signature",
}
"""What --json FILE holds at its top, by command; --dry-run writes the part that is known."""

DONE, CHECK_FAILED, WRONG_INPUT, RETRY = 0, 1, 2, 3
FAILED = 1
"""A fault of ours, with its traceback: what Python itself would leave with."""


class Log(logging.Formatter):
    """Lines of the log, without the secrets of a URI."""

    def format(self, record: logging.LogRecord) -> str:
        return shown_in(super().format(record))


def main(argv: Sequence[str] | None = None) -> None:
    """Run one sub-command and leave with its exit code."""
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
    except Exception:
        sys.stderr.write(shown_in(traceback.format_exc()))
        code = FAILED
    sys.exit(code)


def run(argv: list[str]) -> int:
    """The exit code of one sub-command."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage() + "\n")
        return DONE if argv else WRONG_INPUT
    name, *flags = argv
    if name not in COMMANDS:
        from pipelines.domain import suggest

        return _refuse(
            f"no command called {name!r}{suggest(name, list(COMMANDS))}; `iat --help` lists them"
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Log("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    target: Path | None = None
    try:
        module = importlib.import_module(COMMANDS[name][0])
        flags, target = _json_flag(flags)
        # Values are checked while they are parsed, so parsing is inside the block.
        args = tyro.cli(
            module.Args,
            prog=f"iat {name}",
            description=f"{inspect.getdoc(module.Args)}\n\n--json FILE keys: {JSON_KEYS[name]}.",
            args=flags,
        )
        write_json(target, module.main(args))
    except InputError as error:
        return _refuse(str(error))
    except CheckFailedError as error:
        sys.stderr.write(f"iat {name}: check failed: {error}\n")
        if error.result is not None:
            write_json(target, error.result)
        return CHECK_FAILED
    except RetryableError as error:
        sys.stderr.write(f"iat {name}: {error}\nThis may pass: run the same command again.\n")
        return RETRY
    except OSError as error:
        return _os_error(name, error)
    return DONE


def _json_flag(flags: list[str]) -> tuple[list[str], Path | None]:
    """The flags without --json, and its file."""
    if "--json" in flags:
        at = flags.index("--json")
        if at + 1 == len(flags):
            raise InputError("--json needs a FILE")
        return flags[:at] + flags[at + 2 :], _target(flags[at + 1])
    for at, flag in enumerate(flags):
        if flag.startswith("--json="):
            return flags[:at] + flags[at + 1 :], _target(flag.removeprefix("--json="))
    return flags, None


def _target(name: str) -> Path:
    """Refused before the work, not after it, where its folder does not exist."""
    path = Path(name)
    if not path.absolute().parent.is_dir():
        raise InputError(
            f"--json {name}: there is no folder {path.absolute().parent}; make it first"
        )
    return path


def usage() -> str:
    """The list of sub-commands."""
    from pipelines.domain import known_domains

    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return USAGE.format(commands=commands, domains=", ".join(known_domains()))


def write_json(path: Path | None, result: Any) -> None:
    """Atomically, so that a reader never meets half a file; what is not a number is null."""
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(
        json.dumps(_plain(result), indent=1, sort_keys=True, default=str, allow_nan=False) + "\n"
    )
    temporary.replace(path)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _os_error(name: str, error: OSError) -> int:
    if error.errno == errno.ENOSPC:
        sys.stderr.write(
            f"iat {name}: no space left on the disk ({error.filename or 'the lake'}). Nothing was "
            f"half-written: "
            "free some space and run the same command again.\n"
        )
        return RETRY
    if isinstance(
        error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError
    ):
        return _refuse(f"{error.strerror}: {error.filename}")
    sys.stderr.write(shown_in(traceback.format_exc()))
    return RETRY


def _refuse(message: str) -> int:
    sys.stderr.write(shown_in(f"iat: {message}\n"))
    return WRONG_INPUT


if __name__ == "__main__":
    main()
