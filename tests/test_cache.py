"""Work appears whole or not at all: a kill, a full disk and a second process leave nothing broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from curvlib.cache import cache_dir, locked, publish, workspace
from curvlib.errors import CurvlibError

HANG = """
import time
from curvlib.cache import workspace
with workspace() as folder:
    (folder / "half").write_text("half a file")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path / "cache"))


def test_a_workspace_vanishes_after_success_and_after_failure() -> None:
    with workspace() as first:
        assert first.is_dir()
    with pytest.raises(KeyError), workspace() as second:
        raise KeyError
    assert not first.exists()
    assert not second.exists()


def test_leftovers_of_a_killed_process_are_swept_and_a_living_one_is_spared() -> None:
    with subprocess.Popen([sys.executable, "-c", HANG], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        folder = Path(process.stdout.readline().strip())
        with workspace():
            assert (folder / "half").exists()
        process.kill()
    assert (folder / "half").exists()  # nobody could clean up
    with workspace():
        assert not folder.exists()


def test_a_full_disk_is_one_line() -> None:
    with (
        pytest.raises(CurvlibError, match=r"^the disk that holds .* is full: free some space.*CURVLIB_CACHE.*$"),
        workspace(),
        Path("/dev/full").open("w") as device,  # every write to it fails with ENOSPC
    ):
        device.write("x" * 100_000)


def test_an_unusable_cache_directory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CurvlibError, match="set CURVLIB_CACHE"):
        cache_dir()


def test_publish_replaces_files_and_folders_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with workspace() as folder:
            (folder / "file").write_text(text)
            (folder / "made").mkdir()
            (folder / "made" / text).touch()
            publish(folder / "file", tmp_path / "file")
            publish(folder / "made", tmp_path / "made")
    assert (tmp_path / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]


def test_a_lock_admits_one_process_at_a_time(tmp_path: Path) -> None:
    script = (
        f"from curvlib.cache import locked; from pathlib import Path\nwith locked(Path({str(tmp_path / 'x')!r})): 0"
    )
    with locked(tmp_path / "x"):
        process = subprocess.Popen([sys.executable, "-c", script])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
    assert process.wait(60) == 0
