"""The runner trusts a notebook only when every cell ran in order and in silence, and redoes only what it must."""

from __future__ import annotations

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
from tests.notebook_cases import CLAIM, FIGURE, HEADER, code, lesson, markdown, save

# Only the tests that say so start a kernel, which takes seconds.


def once(source: Path, run_dir: Path, **options: float) -> runner.Outcome:
    return runner.run_notebook(source, run_dir, "ci", 0, **options)  # type: ignore[arg-type]  # fresh, hours


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def foreign_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own "python3" kernel of another interpreter, found before that of the environment."""
    folder = tmp_path / "data" / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")


@pytest.mark.usefixtures("foreign_kernel")
def test_a_run_is_checked_kept_resumed_and_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
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
    assert capfd.readouterr().err == ""

    run_dir = runs / "ci" / "seed0"
    assert {path.name for path in run_dir.iterdir() if path.name != ".lock"} == {
        *("01_good.ipynb", "01_good.results.json", "02_bad.failed.ipynb", "report.html")
    }
    page = (run_dir / "report.html").read_text()
    for piece in ("0 of 1 claims hold", "ZeroDivisionError: division by zero", "The line rises.", "Good lesson"):
        assert piece in page
    assert re.findall(r'<img alt="([^"]*)"[^>]*src="data:image/png;base64', page) == ["A line"]
    assert "sys.executable" not in page, "the page has no code"
    assert not re.search(r"<(img|link|iframe)[^>]*(src|href)=\"(?!data:|#)", page)

    kept = notebook_file.read(source)
    assert notebook_file.problems(kept) == []
    assert len(notebook_file.code_cells(kept)) == 7, "the injected parameters must not be kept"
    assert kept.cells[3].outputs[0].text.split("\n")[:3] == [sys.executable, "1", str(notebooks)]
    assert set(kept.cells[5].outputs[0].data) == {"text/plain", "image/png"}
    assert "papermill" not in str(kept)
    assert kept.cells[-1].outputs[0].execution_count == kept.cells[-1].execution_count == 7

    again = runner.run("ci", 0, ["1"], notebooks=notebooks, runs=runs)
    assert [outcome.state for outcome in again] == ["kept"], "its own outputs must not make a source look changed"
    assert "01_good: its code is unchanged since its last run, kept" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("import sys\n\nsys.exit(0)", "SystemExit: 0"),
        ("import warnings\n\nwarnings.warn('look out')", "wrote to stderr: .*UserWarning: look out"),
        ("import os\n\nos.kill(os.getpid(), 9)", r"out of memory, as a rule\) \(code cell 4 of 5\)"),
    ],
)
def test_what_papermill_accepts_or_hides_is_a_failure(cell: str, fault: str, tmp_path: Path) -> None:
    outcome = once(lesson(tmp_path / "01_x.ipynb", cell), tmp_path / "run")
    assert outcome.state == "failed"
    assert re.search(fault, outcome.fault), outcome.fault
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["01_x.failed.ipynb"]


def test_a_notebook_without_results_or_out_of_order_is_a_failure(tmp_path: Path) -> None:
    cell, results = code("1"), tmp_path / "x.results.json"
    notebook = nbformat.v4.new_notebook(cells=[cell])
    assert "was not executed" in notebook_file.find_fault(notebook, results, "")
    cell.execution_count = 1
    assert "must call Results(...).save()" in notebook_file.find_fault(notebook, results, "")
    assert notebook_file.find_fault(notebook, results, "papermill died") == "papermill died (code cell 0 of 1)"
    results.write_text("{")
    assert "is no results file" in notebook_file.find_fault(notebook, results, "")
    cell.execution_count = 2
    assert "ran out of order" in notebook_file.find_fault(notebook, results, "")


def test_the_limit_stops_a_notebook_and_its_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file, clock = tmp_path / "pid", time.monotonic
    hour_later = lambda: clock() + 3600 * pid_file.exists()  # noqa: E731  the limit comes when the cell runs
    monkeypatch.setattr(subprocess, "_time", hour_later)
    endless = f"import os, pathlib\n\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\nwhile True: pass"
    outcome = once(lesson(tmp_path / "01_x.ipynb", endless), tmp_path / "run", hours=0.5)
    assert outcome.fault == "stopped at its limit of 0:30:00 (code cell 4 of 5)"
    wait_for(lambda: gone(int(pid_file.read_text())))


def test_a_killed_run_leaves_no_process_and_resumes(tmp_path: Path) -> None:
    pid_file, first = tmp_path / "pid", tmp_path / "first"
    body = (
        f"import os, pathlib, time\n\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
        f"while pathlib.Path({str(first)!r}).exists(): time.sleep(0.1)"
    )
    first.touch()
    source = lesson(tmp_path / "01_x.ipynb", body, "print(rate)", header=f"{HEADER}\nrate: float = 0.0")
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
    assert runner.run_notebook(source, run_dir, "ci", 0, {"rate": 0.5}).state == "ran"
    assert not list(run_dir.glob("*running*")), "the half file of the killed run must go"
    assert runner.run_notebook(source, run_dir, "ci", 0, {"rate": 0.5}).state == "kept"
    assert not runner.is_current(run_dir / "01_x.ipynb", run_dir / "01_x.results.json", "another key")
    assert notebook_file.read(run_dir / "01_x.ipynb").cells[5].outputs[0].text == "0.5\n"


def test_every_change_that_matters_asks_for_a_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook_file, "__file__", str(tmp_path / "notebook_file.py"))

    def key(body: str = "1", prose: str = "", module: str = "x = 1", **values: object) -> str:
        (tmp_path / "module.py").write_text(module)
        cells = [code(body), markdown(prose)]
        cells[0].id = "same"
        return notebook_file.fingerprint(nbformat.v4.new_notebook(cells=cells), {"seed": 0, **values})

    assert key() == key(prose="Another sentence.") == key(module="x = 1  # why")
    assert len({key(), key("2"), key(seed=1), key(module="x = 2")}) == 4


def test_parameters_are_checked_before_anything_runs(tmp_path: Path) -> None:
    mistyped = lesson(tmp_path / "01_x.ipynb", header=HEADER.replace("seed", "sead"))
    with pytest.raises(CurvlibError, match=r"sets tier, sead, output_dir, expected also seed$"):
        runner.run("ci", 0, notebooks=mistyped.parent, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    lesson(tmp_path / "01_x.ipynb")
    with pytest.raises(CurvlibError, match="expected also rate"):
        runner.run("ci", 0, parameters={"rate": 1}, notebooks=tmp_path, runs=tmp_path / "runs")
    with pytest.raises(CurvlibError, match="run it with tier='ci', seed=0"):
        runner.run("ci", 1, notebooks=tmp_path, runs=tmp_path / "runs", keep_outputs=True)
    (tmp_path / "01_x.ipynb").write_text("{")
    with pytest.raises(CurvlibError, match=r"01_x\.ipynb"):
        runner.run("ci", 0, notebooks=tmp_path, runs=tmp_path / "runs")


def test_the_page_takes_notebooks_with_the_same_cells_and_leads_to_each(tmp_path: Path) -> None:
    for name in ("01_a", "09_b"):
        notebook = nbformat.v4.new_notebook(cells=[markdown(f"# Title {name}"), markdown("x")])
        notebook.cells[0].id, notebook.metadata["curvlib"] = "same", {"fault": "a | b"}
        notebook_file.write(notebook, tmp_path / f"{name}.failed.ipynb")
    page = notebook_file.write_page(tmp_path, "09").read_text()
    assert page.index("Title 09_b") < page.index("Title 01_a")
    for name in ("01_a", "09_b"):
        assert f'href="#cell-id={name}-0"' in page
        assert f'id="cell-id={name}-0"' in page


def test_only_what_belongs_in_git_is_kept_and_too_much_of_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = code("x")
    cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01"}
    source = save(tmp_path / "01_x.ipynb", cell)
    bundle = {"text/plain": "x" * notebook_file.SIZE_LIMIT, "image/svg+xml": "<svg/>"}
    cell.outputs = [nbformat.v4.new_output("display_data", bundle, metadata={"isolated": True})]
    notebook_file.keep_outputs(source, save(tmp_path / "run" / "01_x.ipynb", cell))
    assert "01_x.ipynb is 1.0 MB" in capsys.readouterr().out
    (kept,) = notebook_file.read(source).cells
    assert kept.execution_count == 1
    assert kept.metadata == {"tags": []}
    assert kept.outputs[0].metadata == {}
    assert list(kept.outputs[0].data) == ["text/plain"]


def test_the_report_runs_last_and_is_never_taken_from_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("A1_appendix", "09_report", "05_lesson"):
        lesson(tmp_path / f"{name}.ipynb")
    assert [path.stem for path in runner.select(tmp_path)] == ["05_lesson", "A1_appendix", "09_report"]

    def execute(source: Path, *_: object) -> str:
        raise KeyboardInterrupt(source.stem)

    monkeypatch.setattr(runner, "is_current", lambda *_: True)
    monkeypatch.setattr(runner, "execute", execute)
    assert once(tmp_path / "05_lesson.ipynb", tmp_path / "run").state == "kept"
    with pytest.raises(KeyboardInterrupt, match="09_report"):
        once(tmp_path / "09_report.ipynb", tmp_path / "run")
