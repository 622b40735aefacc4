"""Points for a folder or zip of submitted notebooks: one row for each student, and a page of feedback."""

import csv
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import psutil

from curvlib.errors import CurvlibError
from curvlib.exercises import live
from curvlib.exercises.answers import decode
from curvlib.exercises.core import POINTS, Answer, LostError, Probe, Verdict, WrongError, assess, load

LOADING = 120  # seconds to import torch, which is not the learner's fault
LARGEST_ZIP = 1_000_000_000  # bytes when unpacked
LARGEST = 20_000_000  # bytes of one reply
ROOT = Path(__file__).resolve().parents[2]
EARNED = attrgetter("earned")
GONE = "the submission ended its own process, or its reply could not be read"


class Submission:
    """One notebook in a process of its own, which is started again after an answer was lost."""

    def __init__(self, notebook: Path, home: str, seconds: float) -> None:
        self.notebook, self.home, self.seconds = notebook.resolve(), home, seconds
        self.kinds, late = "values", []
        try:
            ready = self.start()
        except LostError:
            self.kinds, late = "bare", ["assignments outside functions took too long and were left out"]
            ready = self.start()
        self.functions: list[str] = ready["functions"]
        self.remarks: list[str] = ready["remarks"] + late

    def start(self) -> dict[str, Any]:
        """Start the process and wait until it has read the notebook's definitions."""
        environment = {"HOME": self.home, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
        self.process = psutil.Popen(
            [sys.executable, "-m", "curvlib.exercises.answers", str(int(10 * self.seconds))],
            **{"cwd": self.home, "env": environment, "start_new_session": True},
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL},
        )
        self.reply(LOADING)
        ready: dict[str, Any] = self.ask(self.notebook, self.kinds)
        return ready

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of a function of the submission, which leaves its marks on the arguments as it would do here."""
        if self.process.poll() is not None:
            self.start()
        reply = self.ask(name, arguments)
        if reply.get("error") == "NotImplementedError":
            raise NotImplementedError
        if "error" in reply:
            raise WrongError(f"stopped with {reply['message']}")
        for argument, change in zip(arguments, reply["changes"], strict=True):
            if isinstance(argument, Probe):
                argument.log = change
            elif change is not None:
                argument.data.copy_(change)
        return reply["result"]

    def ask(self, *question: Any) -> Any:
        """The reply to a question, of which the process expects one at a time."""
        with suppress(BrokenPipeError):  # then no reply comes either
            pickle.dump(question, self.process.stdin)
            self.process.stdin.flush()
        return self.reply(self.seconds)

    def reply(self, seconds: float) -> Any:
        """One line from the process; LostError where it comes too late, is too long or is no JSON."""
        line, end, pipe = bytearray(), time.monotonic() + seconds, self.process.stdout
        try:
            while not line.endswith(b"\n"):
                if not select.select([pipe], [], [], max(0, end - time.monotonic()))[0]:
                    raise LostError(f"no answer within {seconds:.0f} seconds: an endless loop?")
                line += (part := os.read(pipe.fileno(), 1 << 20))
                if not part or len(line) > LARGEST:
                    raise LostError(f"the result has more than {LARGEST:,} bytes" if part else GONE)
            return json.loads(line, object_hook=decode)
        except Exception as error:
            self.stop()
            raise error if isinstance(error, LostError) else LostError(GONE) from None

    def stop(self) -> None:
        """End the process and all that it started."""
        with suppress(OSError), self.process:  # leaving it closes its pipes and waits for it
            with suppress(psutil.NoSuchProcess):  # the leader is gone
                for process in self.process.children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            os.killpg(self.process.pid, signal.SIGKILL)


def grade(path: Path, names: Sequence[str], seeds: Sequence[int], seconds: float) -> tuple[list[Verdict], list[str]]:
    """The verdict on each exercise of these names, and remarks for the teacher."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        try:
            submission = Submission(path, home, seconds)
        except LostError as error:
            return [Verdict(name, 0, load()[name], f"not graded: {error}") for name in names], [str(error)]
        verdicts = [
            assess(name, Answer(partial(submission.call, name)), seeds)
            if name in submission.functions
            else Verdict(name, 0, load()[name], "no function of this name was handed in")
            for name in names
        ]
        submission.stop()
    return verdicts, submission.remarks


def submissions(folder: Path) -> dict[str, list[Path]]:
    """The notebooks of each student: NAME.ipynb, or every notebook below a folder NAME."""
    students: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.ipynb")):
        if not {".ipynb_checkpoints", "__MACOSX"} & set(path.parts):
            students.setdefault(path.relative_to(folder).parts[0].removesuffix(".ipynb"), []).append(path)
    if not students:
        raise CurvlibError(f"{folder} holds no notebook: expected NAME.ipynb or a folder NAME for each student")
    return students


def grade_class(source: Path, out: Path, notebooks: Sequence[str], seed: int, seconds: float) -> Path:
    """Grade every student, write ``feedback/NAME.md`` one by one and ``grades.csv`` at the end; return its path.

    Where a student handed in several notebooks, the best verdict on each exercise counts. Live parts, results files in
    the student's folder, are judged too; their points stand apart from the total.
    """
    points, seeds, seen = load(*notebooks), [1000 * seed + k for k in range(5)], dict[str, str]()
    table: list[list[object]] = [["student", *points, "total", "of", "live", "remarks", "seed"]]
    total = sum(points.values())
    (out / "feedback").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as unpacked:
        folder = unpack(source, Path(unpacked))
        for student, paths in submissions(folder).items():
            graded = [grade(path, list(points), seeds, seconds) for path in paths]
            remarks = [remark for _, some in graded for remark in some]
            best = [max(each, key=EARNED) for each in zip(*(verdicts for verdicts, _ in graded), strict=True)]
            parts = [live.verdict(path, student, seen) for path in (folder / student).rglob("*_live.results.json")]
            extra = {each.name: each for each in sorted(parts, key=EARNED) if each.name[:2] in (notebooks or POINTS)}
            earned, more = (sum(map(EARNED, some)) for some in (best, extra.values()))
            name = f"'{student}" if student[0] in "=+-@" else student  # a spreadsheet takes these for formulas
            table.append([name, *map(EARNED, best), earned, total, more, " | ".join(remarks), seed])
            lines = [f"# {student}: {earned} of {total} points", ""]
            lines += [f"- {each} ({each.earned} of {each.points})" for each in (*best, *extra.values())]
            lines += [f"- {remark}" for remark in remarks]
            (out / "feedback" / f"{student}.md").write_text("\n".join(lines) + "\n", "utf-8")
            print(f"{student}: {earned} of {total} points")
    with (out / "grades.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    return out / "grades.csv"


def unpack(source: Path, folder: Path) -> Path:
    """The folder of submissions: the source itself, or what a zip of at most 1 GB holds."""
    if source.is_dir():
        return source
    if not zipfile.is_zipfile(source):
        raise CurvlibError(f"{source} is neither a folder nor a zip: give one that holds the submitted notebooks")
    with zipfile.ZipFile(source) as archive:
        if sum(member.file_size for member in archive.infolist()) > LARGEST_ZIP:
            raise CurvlibError(f"{source} unpacks to more than {LARGEST_ZIP:,} bytes: take out what is no notebook")
        archive.extractall(folder)  # zipfile keeps names inside the folder
    return folder
