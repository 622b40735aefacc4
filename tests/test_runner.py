"""The runner trusts a notebook only when every cell ran in order and in silence, and redoes only what it must."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest

from curvlib import notebook_file, runner
from curvlib.errors import CurvlibError
from curvlib.execution import Ending
from tests.notebook_cases import CLAIM, FIGURE, HEADER, code, lesson, markdown, save

# Only the tests that say so start a kernel, which takes seconds.


def once(source: Path, run_dir: Path, **options: float) -> runner.Outcome:
    return runner.run_notebook(source, run_dir, "ci", 0, **options)  # type: ignore[arg-type]  # fresh, limit_s


@pytest.fixture
def foreign_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own "python3" kernel of another interpreter, found before that of the environment."""
    folder = tmp_path / "data" / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")


@pytest.mark.usefixtures("foreign_kernel")
def test_a_run_is_checked_kept_resumed_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebooks, runs = tmp_path / "note{books}", tmp_path / "runs{tier}"
    source = save(
        notebooks / "01_good.ipynb",
        markdown("# Good lesson"),
        code(HEADER, "parameters"),
        code("from curvlib.report import Results\n\nresults = Results('01_good', tier, seed, output_dir)"),
        code("import sys, os\n\nprint(sys.executable)\nprint(os.environ['TQDM_DISABLE'])\nprint(os.getcwd())"),
        markdown("## A line"),
        code(FIGURE),
        markdown("The line rises."),
        code(CLAIM.format(holds=False)),
        code("path = results.save()"),
        code("seed"),
    )
    lesson(notebooks / "02_bad.ipynb", "1 / 0")
    outcomes = runner.run("ci", 0, notebooks=notebooks, runs=runs, keep_outputs=True)
    assert [outcome.state for outcome in outcomes] == ["ran", "failed"]
    assert outcomes[1].fault == "code cell 4 (`1 / 0`): ZeroDivisionError: division by zero"

    run_dir = runs / "ci" / "seed0"
    assert {path.name for path in run_dir.iterdir() if path.name != ".lock"} == {
        *("01_good.ipynb", "01_good.results.json", "02_bad.failed.ipynb", "report.html")
    }
    page = (run_dir / "report.html").read_text()
    assert "0 of 1 claims hold; 1 of 2 notebooks completed." in page
    assert 'alt="Figure 1 of Good lesson: A line. The line rises."' in page
    assert base64.b64decode(re.findall(r"base64,([^\"]+)", page)[0]).startswith(b"\x89PNG")
    assert "ZeroDivisionError" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)

    kept = notebook_file.read(source)
    assert notebook_file.problems(kept) == []
    assert len(notebook_file.code_cells(kept)) == 7, "the injected parameters must not be kept"
    assert kept.cells[3].outputs[0].text.split("\n")[:3] == [sys.executable, "1", str(notebooks)]
    assert set(kept.cells[5].outputs[0].data) == {"text/plain", "image/png"}
    assert "papermill" not in str(kept)
    assert kept.cells[-1].outputs[0].execution_count == kept.cells[-1].execution_count == 7

    capsys.readouterr()
    again = runner.run("ci", 0, ["1"], notebooks=notebooks, runs=runs)
    assert [outcome.state for outcome in again] == ["kept"], "its own outputs must not make a source look changed"
    assert "01_good: unchanged since its last run, kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("import sys\n\nsys.exit(0)", "SystemExit: 0"),
        ("import warnings\n\nwarnings.warn('look out')", "wrote to stderr: .*UserWarning: look out"),
        ("import os\n\nos.kill(os.getpid(), 9)", "out of memory, as a rule"),
    ],
)
def test_what_papermill_accepts_or_hides_is_a_failure(cell: str, fault: str, tmp_path: Path) -> None:
    outcome = once(lesson(tmp_path / "01_x.ipynb", cell), tmp_path / "run")
    assert outcome.state == "failed"
    assert re.search(fault, outcome.fault), outcome.fault
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["01_x.failed.ipynb"]


def test_a_notebook_without_results_is_a_failure(tmp_path: Path) -> None:
    cell = code("1")
    cell.execution_count = 1
    working, results = save(tmp_path / "x.ipynb", cell), tmp_path / "x.results.json"
    assert "must call Results(...).save()" in runner.find_fault(Ending(0, False, ""), working, results, 1)
    results.write_text("{")
    assert "is no results file" in runner.find_fault(Ending(0, False, ""), working, results, 1)
    cell.execution_count = 2
    save(working, cell)
    assert "ran out of order" in runner.find_fault(Ending(0, False, ""), working, results, 1)
    working.write_text("half a notebo")
    assert "starting the kernel): last words" in runner.find_fault(Ending(1, False, "last words"), working, results, 1)


def test_the_limit_stops_a_notebook_and_its_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file, clock = tmp_path / "pid", time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 1000 * pid_file.exists())  # the limit comes when it runs
    endless = f"import os, pathlib\n\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\nwhile True: pass"
    outcome = once(lesson(tmp_path / "01_x.ipynb", endless), tmp_path / "run", limit_s=600)
    assert outcome.fault == "stopped at its time limit of 10 min 0 s (code cell 4 of 5)"
    assert gone(int(pid_file.read_text()))


def test_a_killed_run_leaves_no_process_and_resumes(tmp_path: Path) -> None:
    pid_file, first = tmp_path / "pid", tmp_path / "first"
    body = (
        f"import os, pathlib, time\n\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
        f"while pathlib.Path({str(first)!r}).exists(): time.sleep(0.1)"
    )
    first.touch()
    source = lesson(tmp_path / "01_x.ipynb", body)
    command = (
        "from pathlib import Path; from curvlib import runner; "
        f"runner.run('ci', 0, notebooks=Path({str(tmp_path)!r}), runs=Path({str(tmp_path / 'runs')!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.DEVNULL)
    wait_for(lambda: pid_file.exists() and pid_file.read_text() != "")
    with pytest.raises(CurvlibError, match="another run is at work"):
        runner.run("ci", 0, notebooks=tmp_path, runs=tmp_path / "runs")
    child.kill()
    child.wait()
    wait_for(lambda: gone(int(pid_file.read_text())))
    first.unlink()
    run_dir = tmp_path / "runs" / "ci" / "seed0"
    assert not (run_dir / "01_x.ipynb").exists()
    assert once(source, run_dir).state == "ran"
    assert not list(run_dir.glob("*running*")), "the half file of the killed run must go"
    assert once(source, run_dir).state == "kept"


def test_every_change_that_matters_asks_for_a_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(body: str = "1", **values: object) -> str:
        source = save(tmp_path / "01_x.ipynb", code(body))
        notebook = notebook_file.read(source)
        notebook.cells[0].id = "same"
        return notebook_file.fingerprint(notebook, {"seed": 0, **values})

    base = key()
    assert key() == base
    assert len({base, key("2"), key(seed=1)}) == 3
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(notebook_file, "__file__", str(package / "notebook_file.py"))
    (package / "a.py").write_text("1")
    first = key()
    (package / "a.py").write_text("2")
    assert key() != first


def test_parameters_are_checked_before_anything_runs(tmp_path: Path) -> None:
    mistyped = lesson(tmp_path / "01_x.ipynb", header=HEADER.replace("seed", "sead"))
    with pytest.raises(CurvlibError, match=r"sets tier, sead, output_dir, expected also seed$"):
        runner.run("ci", 0, notebooks=mistyped.parent, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    lesson(tmp_path / "01_x.ipynb")
    with pytest.raises(CurvlibError, match="run it with --tier ci --seed 0"):
        runner.run("ci", 1, notebooks=tmp_path, runs=tmp_path / "runs", keep_outputs=True)
    (tmp_path / "01_x.ipynb").write_text("{")
    with pytest.raises(CurvlibError, match=r"01_x\.ipynb"):
        runner.run("ci", 0, notebooks=tmp_path, runs=tmp_path / "runs")


def test_only_what_belongs_in_git_is_kept_and_too_much_of_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = code("x")
    source = save(tmp_path / "01_x.ipynb", cell)
    cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01"}
    bundle = {"text/plain": "x" * notebook_file.SIZE_LIMIT, "image/svg+xml": "<svg/>"}
    cell.outputs = [nbformat.v4.new_output("display_data", bundle, metadata={"isolated": True})]
    save(tmp_path / "run" / "01_x.ipynb", cell)
    runner.keep(source, tmp_path / "run")
    assert "01_x.ipynb is 1.0 MB" in capsys.readouterr().out
    (kept,) = notebook_file.read(source).cells
    assert kept.execution_count == 1
    assert kept.metadata == {"tags": []}
    assert kept.outputs[0].metadata == {}
    assert list(kept.outputs[0].data) == ["text/plain"]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, os.times()
        time.sleep(0.1)


def test_the_report_runs_after_lessons_and_appendices(tmp_path: Path) -> None:
    for name in ("A1_appendix", "09_report", "05_lesson", "00_start"):
        (tmp_path / f"{name}.ipynb").touch()
    assert [path.stem for path in runner.select(tmp_path)] == ["00_start", "05_lesson", "A1_appendix", "09_report"]
    assert [path.stem for path in runner.select(tmp_path, ["09", "A1"])] == ["A1_appendix", "09_report"]


def test_the_report_is_never_taken_from_an_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[str] = []

    def execute(source: Path, *_: object) -> Ending:
        began.append(source.stem)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "is_current", lambda *_: True)
    monkeypatch.setattr(runner, "execute", execute)
    assert once(lesson(tmp_path / "05_lesson.ipynb"), tmp_path / "run").state == "kept"
    with pytest.raises(KeyboardInterrupt):
        once(lesson(tmp_path / "09_report.ipynb"), tmp_path / "run")
    assert began == ["09_report"]
