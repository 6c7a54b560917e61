"""Set-up: locks, the stamp, this machine's Java, Delta's jars with and without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from benchmarks.contestants import BENCH
from jobs.jars import _trust_system_certificates, find_jars, jar_paths, locked_jars, resolve
from jobs.java import ARCHIVE, Java, find_java
from jobs.setup import (
    BOOTSTRAP_LOCK,
    LOCK,
    NEEDED_GB,
    ROOT,
    check_machine,
    is_up_to_date,
    stamp_of,
    uv_settings,
)
from jobs.setup_airflow import AIRFLOW
from pipelines.errors import InputError

ENOUGH = NEEDED_GB * 2**30

WRITE_AND_READ = """
import sys
from jobs.spark import session
spark = session("local[1]", memory="1g")
spark.range(3).write.format("delta").save(sys.argv[1])
print(spark.read.format("delta").load(sys.argv[1]).count(), "rows on Java",
      spark._jvm.System.getProperty("java.specification.version"))
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def run_python(
    code: str, *arguments: object, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own; an environment variable of None is taken away."""
    changed = {name: value for name, value in environment.items() if value is not None}
    kept = {name: value for name, value in os.environ.items() if name not in environment}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=kept | changed,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.mark.parametrize(
    "lock",
    [LOCK, BOOTSTRAP_LOCK, AIRFLOW.lock, BENCH.lock],
    ids=lambda lock: lock.name,
)
def test_a_lock_names_no_host_and_every_package_has_a_hash(lock: Path) -> None:
    text = lock.read_text()
    assert not re.search(r"://|index-url|find-links|trusted-host", text)
    packages = re.findall(r"^[\w.-]+==\S+.*?(?=^[\w.-]+==|\Z)", text, re.MULTILINE | re.DOTALL)
    assert packages
    assert all("--hash=sha256:" in package for package in packages)


def test_what_was_made_from_other_inputs_or_elsewhere_is_made_again(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("numpy==2.0")
    here = stamp_of((lock,), tmp_path)
    assert stamp_of((lock,), tmp_path) == here
    assert stamp_of((lock,), tmp_path / "moved") != here
    lock.write_text("numpy==2.1")
    assert stamp_of((lock,), tmp_path) != here


@pytest.mark.parametrize("broken", ["stamp", "python", "jars", None])
def test_only_a_whole_environment_is_up_to_date(tmp_path: Path, broken: str | None) -> None:
    share = tmp_path / "share" / "iat"
    made = {"python": tmp_path / "bin" / "python", "jars": share / "jars" / "delta.jar"}
    for name, path in {**made, "stamp": share / "set-up"}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != broken:
            path.write_text("s1")
    assert is_up_to_date(tmp_path, "s1") == (broken is None)
    assert not is_up_to_date(tmp_path, "s2")


@pytest.mark.parametrize(
    ("version", "platform", "free", "says"),
    [
        ((3, 10, 4), "linux", ENOUGH, r"Python 3\.11 or newer is needed, and .* is 3\.10\.4"),
        ((3, 12, 0), "darwin", ENOUGH, "this is darwin: use a Linux container"),
        ((3, 12, 0), "linux", 2**30, r"take 8 GB and .* has 1\.0 GB free: make room"),
    ],
)
def test_a_machine_that_cannot_hold_it_is_told_why(
    version: tuple[int, ...], platform: str, free: int, says: str
) -> None:
    check_machine((3, 11, 0), "linux", ENOUGH)
    with pytest.raises(InputError, match=says):
        check_machine(version, platform, free)


def test_what_pip_was_told_holds_for_uv() -> None:
    config = "\n".join(
        [
            ":env:.find-links='/a /b'",
            ":env:.timeout='60'",
            "global.find-links='/files'",
            "global.index-url='mirror/simple'",
            "install.no-index='true'",
            "global.cert='/corporate.pem'",
        ]
    )
    assert uv_settings(config, {"SSL_CERT_FILE": "/mine.pem"}) == {
        "UV_FIND_LINKS": "/a,/b",
        "UV_DEFAULT_INDEX": "mirror/simple",
        "UV_NO_INDEX": "true",
    }


def test_a_java_too_old_or_broken_is_passed_over_and_named(tmp_path: Path) -> None:
    old = executable(
        tmp_path / "old" / "java",
        "echo '    java.home = /old' >&2; echo '    java.specification.version = 1.8' >&2",
    )
    broken = executable(tmp_path / "broken" / "java", "exit 1")
    candidates = [("JAVA_HOME", broken), ("PATH", old)]
    with pytest.raises(InputError) as refusal:
        find_java(candidates)
    assert f"JAVA_HOME: {broken} does not run; PATH: {old} is Java 8" in str(refusal.value)
    assert "make setup" in str(refusal.value)
    good = find_java()
    assert find_java([*candidates, ("PATH", good.home / "bin" / "java")]).version >= 17


def test_without_any_java_the_message_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"Java 17 or newer and there is none.*no java on PATH"):
        find_java([])


def test_the_launcher_passes_every_word_on_but_the_vector_module(tmp_path: Path) -> None:
    home = tmp_path / "it's a java"
    executable(home / "bin" / "java", 'for word do echo "<$word>"; done')
    launcher = Java(home, 17, "PATH").launcher_home() / "bin" / "java"
    try:
        words = ["-cp", "a b", "--add-modules=jdk.incubator.vector", "Main", "$x", "", "'"]
        said = subprocess.run([launcher, *words], capture_output=True, text=True, check=True)
    finally:
        shutil.rmtree(launcher.parents[1])
    words.remove("--add-modules=jdk.incubator.vector")
    assert said.stdout.splitlines() == [f"<{word}>" for word in words]


def test_an_archive_of_classes_that_is_not_this_javas_is_left_alone() -> None:
    launcher = find_java().launcher_home()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(launcher / "bin", Path(folder, "bin")))
        (copy.parent / ARCHIVE).write_bytes(b"no archive at all")
        said = subprocess.run(
            [copy / "java", "-version"], capture_output=True, text=True, check=True
        )
    assert said.stdout == ""
    assert not [line for line in said.stderr.splitlines() if "rror" in line or "arn" in line]


def test_a_session_starts_with_the_archive_that_set_up_made(spark: SparkSession) -> None:
    archive = find_java().launcher_home() / ARCHIVE
    if not archive.exists():
        pytest.skip("this Java comes without an archive to build upon")
    jvm: Any = spark.sparkContext._jvm
    java = jvm.java.lang.ProcessHandle.current().pid()
    assert str(archive) in Path(f"/proc/{java}/maps").read_text()


@pytest.mark.slow
def test_a_machine_without_java_writes_and_reads_delta(tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        for tool in folder.glob("*"):
            if tool.name != "java" and not (bare / tool.name).is_symlink():
                (bare / tool.name).symlink_to(tool)
    assert shutil.which("java", path=str(bare)) is None
    done = run_python(WRITE_AND_READ, tmp_path / "table", PATH=str(bare), JAVA_HOME=None)
    assert done.stdout.strip() == "3 rows on Java 21", done.stderr


def test_jars_are_taken_from_any_folder_under_either_name(tmp_path: Path) -> None:
    for number, (jar, path) in enumerate(zip(locked_jars(), jar_paths(), strict=True)):
        prefix = f"{jar.coordinates.split(':')[0]}_" if number % 2 else ""
        deep = tmp_path / str(number)
        deep.mkdir()
        shutil.copy(path, deep / f"{prefix}{jar.file_name}")
    assert [path.parent.name for path in find_jars(tmp_path)] == list("01234567")


def test_missing_jars_are_listed_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IAT_JARS", str(tmp_path))
    with pytest.raises(InputError) as refusal:
        jar_paths()
    message = str(refusal.value)
    assert "io.delta:delta-spark_4.2_2.13:4.4.0 is missing" in message
    assert "set IAT_JARS to it" in message
    assert all(jar.coordinates in message for jar in locked_jars())


def test_a_jar_of_other_bytes_is_refused(tmp_path: Path) -> None:
    for path in jar_paths():
        shutil.copy(path, tmp_path)
    damaged = tmp_path / jar_paths()[0].name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{damaged.name} is not .*: its SHA-256 is"):
        find_jars(tmp_path)


def test_set_up_copies_the_jars_of_a_machine_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    for path in jar_paths():
        shutil.copy(path, there)
    monkeypatch.setenv("IAT_JARS", str(there))
    assert "from IAT_JARS" in resolve(here)
    assert len(find_jars(here)) == len(locked_jars())


@pytest.mark.slow
def test_maven_out_of_reach_is_said_with_every_coordinate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IAT_JARS", raising=False)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(InputError) as refusal:
        resolve(tmp_path)
    message = str(refusal.value)
    assert message.startswith("could not fetch Delta's jars from Maven")
    assert all(jar.coordinates in message for jar in locked_jars())
    assert not list(tmp_path.iterdir())


def test_java_reads_the_system_certificates(tmp_path: Path) -> None:
    tool = find_java().home / "bin" / "keytool"
    if not tool.exists():
        pytest.skip(f"needs {tool}")
    store = tmp_path / "certificates.jks"
    _trust_system_certificates(store)
    words = ["-list", "-keystore", store, "-storepass", "changeit"]
    listed = subprocess.run([tool, *words], capture_output=True, text=True, check=True).stdout
    assert "system-0" in listed
    assert "trustedCertEntry" in listed


@pytest.mark.slow
def test_a_second_set_up_does_nothing_and_says_so() -> None:
    make = subprocess.run(
        ["make", "setup"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert make.stderr == "set-up: nothing to do, .venv is up to date\n"
