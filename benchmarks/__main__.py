"""All benchmarks that need no GPU, one after another, and at the end what misses its bar.

`make bench`: each in a process of its own; `make bench ONLY=fetch` runs one, with its own flags.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("fetch", "loader", "cost_curves", "contestants", "streams", "day_cost")
"""Quick ones first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="the rows of all")
    args = parser.parse_args()
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            sys.stdout.write(f"\n{name}\n")
            sys.stdout.flush()
            found = Path(folder, f"{name}.json")
            command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(found)]
            if subprocess.run(command, check=False).returncode:
                failed.append(name)
            else:
                rows += json.loads(found.read_text())
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    missed = [row for row in rows if row["met"] is False]
    sys.stdout.write(f"\n{len(rows)} rows, {len(missed)} miss their bar\n")
    for row in missed:
        sys.stdout.write(
            f"  {row['name']}: {row['ratio']:.3f} x {row['against']}, bar {row['bar']}\n"
        )
    if failed:
        sys.exit(f"did not run to the end: {', '.join(failed)}")


if __name__ == "__main__":
    main()
