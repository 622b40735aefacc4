"""A stage is made once, appears whole, resumes after a kill, and is refused when damaged."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from curvlib.artifacts import MANIFEST, VERSIONS, artifact, artifact_key
from curvlib.errors import CurvlibError

CONFIG = {"rank": 8, "rates": [0.1, 0.2]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path))
    return tmp_path


def write(folder: Path) -> None:
    (folder / "inner").mkdir(exist_ok=True)
    (folder / "inner" / "weights").write_text("numbers")


def never(folder: Path) -> None:
    folder.touch()
    raise AssertionError("built a second time")


def test_it_is_built_once() -> None:
    first = artifact("stage", CONFIG, write)
    assert (first / "inner" / "weights").read_text() == "numbers"
    assert artifact("stage", dict(reversed(CONFIG.items())), never) == first


def test_another_configuration_is_another_artifact() -> None:
    assert artifact_key(CONFIG) != artifact_key({**CONFIG, "rank": 9})


def test_another_version_is_another_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    first = artifact("stage", CONFIG, write)
    monkeypatch.setitem(VERSIONS, "stage", 2)
    assert artifact("stage", CONFIG, write) != first


def test_a_killed_build_goes_on_from_its_partial_folder() -> None:
    def killed(folder: Path) -> None:
        (folder / "checkpoint").write_text("step 5")
        raise KeyboardInterrupt

    def resumed(folder: Path) -> None:
        assert (folder / "checkpoint").read_text() == "step 5"
        (folder / "checkpoint").unlink()
        write(folder)

    with pytest.raises(KeyboardInterrupt):
        artifact("stage", CONFIG, killed)
    folder = artifact("stage", CONFIG, resumed)
    assert not list(folder.parent.glob("*.partial"))


@pytest.mark.parametrize("damage", ["change", "remove", "add", "manifest", "other configuration"])
def test_a_damaged_or_foreign_file_is_named(damage: str) -> None:
    folder = artifact("stage", CONFIG, write)
    weights, manifest = folder / "inner" / "weights", folder / MANIFEST
    named = {"add": folder / "extra", "manifest": manifest, "other configuration": folder}.get(damage, weights)
    if damage == "remove":
        weights.unlink()
    elif damage == "other configuration":
        manifest.write_text(manifest.read_text().replace("8", "9"))
    else:
        named.write_text("other")
    with pytest.raises(CurvlibError, match="run again to rebuild it") as caught:
        artifact("stage", CONFIG, never)
    assert str(named) in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(cache: Path) -> None:
    def full(folder: Path) -> None:
        write(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CurvlibError, match="full: free some space"):
        artifact("stage", CONFIG, full)
    assert not [path for path in (cache / "artifacts").iterdir() if path.is_dir()]
