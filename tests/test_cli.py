"""Each mistake gives one line and its exit status; nothing here starts a kernel."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from curvlib import runner
from curvlib.cli import main
from curvlib.errors import CurvlibError
from curvlib.report import ROOT
from tests.notebook_cases import markdown, save


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, without its beginning."""
    text = capsys.readouterr().err
    assert text.startswith("curvlib: error: ")
    assert text.count("\n") == 1
    return text.removeprefix("curvlib: error: ").strip()


def test_an_unknown_tier_and_a_missing_gpu_come_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", "--tier", "tpu", "--only", "99"]) == 1
    assert error_line(capsys).startswith("no tier is called 'tpu': ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["run", "--tier", "gpu", "--only", "99"]) == 1
    assert "tier gpu needs a CUDA device" in error_line(capsys)


def test_unknown_names_tell_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(CurvlibError, match=r"no notebook NN_\*\.ipynb"):
        runner.select(tmp_path)
    for name in ("A1_appendix", "00_a", "04_bend", "x4_c", "studies/S1_price", "Untitled1"):
        save(tmp_path / f"{name}.ipynb", markdown("x"))
    for only, chosen in {
        (): ["00_a", "04_bend", "A1_appendix"],
        ("a1", " 4"): ["04_bend", "A1_appendix"],
        ("bend",): ["04_bend"],
    }.items():
        assert [path.stem for path in runner.select(tmp_path, only)] == chosen
    assert [path.stem for path in runner.select(tmp_path / "studies", ["price"])] == ["S1_price"]
    for unknown in ("5", "", "all", "A2", "A", "price"):
        with pytest.raises(CurvlibError, match=rf"unknown notebook '{unknown}': .* has 00_a, 04_bend, A1_appendix$"):
            runner.select(tmp_path, ["0", unknown])


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "give the same command again to resume"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "the disk is full at /x/y"),
        (CurvlibError("what to do"), 1, "what to do"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
            1,
            "CUDA out of memory: give shorter",
        ),
    ],
)
def test_what_stops_a_run_is_told_in_one_line(
    raised: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(runner, "run", stop)
    assert main(["run"]) == status
    assert line in error_line(capsys)


@pytest.mark.parametrize("defect", [PermissionError(errno.EACCES, "x"), RuntimeError("x")])
def test_a_defect_of_ours_keeps_its_traceback(defect: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise defect

    monkeypatch.setattr(runner, "run", stop)
    with pytest.raises(type(defect)):
        main(["run"])


def test_options_reach_the_runner_and_failures_the_exit_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def run(*given: object, **options: object) -> list[runner.Outcome]:
        seen.append((given, options))
        return outcomes

    monkeypatch.setattr(runner, "run", run)
    outcomes = [runner.Outcome("00_a", "ran"), runner.Outcome("01_b", "kept")]
    assert main(["run"]) == 0
    outcomes.append(runner.Outcome("02_c", "failed", fault="x"))
    words = "run --tier ci --seed 3 --only 00,1 --fresh --keep-outputs --studies --limit 0.5 -p part mixed -p all False"
    assert main(words.split()) == 1
    assert error_line(capsys) == "1 of 3 notebooks failed: 02_c"
    usual = {"parameters": {}, "fresh": False, "keep_outputs": False, "hours": 3.0}
    folders = {"notebooks": ROOT / "notebooks", "runs": ROOT / "runs"}
    other = {"parameters": {"part": "mixed", "all": False}, "fresh": True, "keep_outputs": True, "hours": 0.5}
    assert seen == [
        (("cpu", 0, ()), usual | folders),
        (("ci", 3, ["00", "1"]), other | {name: folder / "studies" for name, folder in folders.items()}),
    ]


@pytest.mark.parametrize("words", [[], ["walk"], ["run", "--seed", "x"], ["run", "-p", "rate"]])
def test_wrong_usage_exits_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


def test_the_module_runs() -> None:
    command = [sys.executable, "-m", "curvlib", "run", "--tier", "tpu"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("curvlib: error: no tier is called 'tpu'")
