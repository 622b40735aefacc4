"""Points for a folder or zip of submitted notebooks: one row for each student, and a page of feedback."""

import base64
import copy
import csv
import json
import os
import pickle
import select
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from curvlib.errors import CurvlibError
from curvlib.exercises import live
from curvlib.exercises.core import Answer, LostError, Probe, RemoteError, Verdict, assess, load

LOADING = 120  # seconds to import torch, which is not the learner's fault
LARGEST_ZIP = 1_000_000_000  # bytes when unpacked
LARGEST = 20_000_000  # bytes of one reply
ROOT = Path(__file__).resolve().parents[2]
BROKEN = "the file is no notebook: ask for it again"
GONE = "the submission ended its own process, or its reply could not be read"


def decode(reply: dict[str, Any]) -> Any:
    """The result of a call, from JSON."""
    if "value" in reply:
        return reply["value"]
    if "items" in reply:
        items = [decode(item) for item in reply["items"]]
        return dict(zip(map(decode, reply["keys"]), items, strict=True)) if "keys" in reply else items
    if "dtype" in reply:
        data, dtype = bytearray(base64.b64decode(reply["data"])), getattr(torch, reply["dtype"])
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.view(reply["shape"]).requires_grad_(reply["graph"] is True)
    raise RemoteError(f"returned {reply['other']}, which is no number, tensor or list of these")


class Submission:
    """One notebook in a process of its own, which is started again after an answer was lost."""

    def __init__(self, notebook: Path, home: str, seconds: float) -> None:
        self.notebook, self.home, self.seconds = notebook.resolve(), home, seconds
        self.kinds, slow = "values", []
        try:
            ready = self.start()
        except LostError:
            self.kinds, slow = "bare", ["assignments outside functions took too long and were left out"]
            ready = self.start()
        self.functions: list[str] = ready["functions"]
        self.remarks: list[str] = ready["remarks"] + slow

    def start(self) -> dict[str, Any]:
        """Start the process and wait until it has read the notebook's definitions."""
        environment = {"HOME": self.home, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["PATH"], self.received = os.environ["PATH"], bytearray()
        arguments = [str(int(10 * self.seconds)), self.kinds, str(self.notebook)]
        command = [sys.executable, "-m", "curvlib.exercises.answers", *arguments]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, cwd=self.home, env=environment, stdin=pipe, stdout=pipe, stderr=null, start_new_session=True
        )
        self.reply(LOADING)
        return self.reply(self.seconds)

    def call(self, name: str, arguments: Sequence[Any]) -> dict[str, Any]:
        """The reply to one call of a function."""
        if self.process.poll() is not None:
            self.start()
        assert self.process.stdin
        try:
            pickle.dump((name, arguments), self.process.stdin)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise LostError(GONE) from None
        reply = self.reply(self.seconds)
        if "error" in reply:
            if reply["error"] == "NotImplementedError":
                raise NotImplementedError
            raise RemoteError(reply["message"])
        return reply

    def reply(self, seconds: float) -> dict[str, Any]:
        """One line from the process; LostError where it comes too late, is too long or is no JSON."""
        assert self.process.stdout
        end = time.monotonic() + seconds
        while b"\n" not in self.received:
            if not select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))[0]:
                self.stop()
                raise LostError(f"no answer within {seconds:.0f} seconds: an endless loop?")
            part = os.read(self.process.stdout.fileno(), 1 << 20)
            self.received += part
            if not part or len(self.received) > LARGEST:
                self.stop()
                raise LostError(f"the result has more than {LARGEST:,} bytes" if part else GONE)
        line, _, self.received = self.received.partition(b"\n")
        try:
            reply = json.loads(line)
            assert isinstance(reply, dict)
        except (ValueError, RecursionError, AssertionError):
            self.stop()
            raise LostError(GONE) from None
        return reply

    def stop(self) -> None:
        """End the process and all that it started."""
        with suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self.process.pid)
            for process in [*leader.children(recursive=True), leader]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


class RemoteAnswer(Answer):
    """A function of a submission, called in its process."""

    def __init__(self, submission: Submission, name: str) -> None:
        self.submission, self.name = submission, name

    def run(self, *arguments: Any) -> tuple[Any, Sequence[Any]]:
        """The function's result, and the arguments as it left them."""
        reply = self.submission.call(self.name, arguments)
        copies = copy.deepcopy(arguments)
        try:
            for argument, after in zip(copies, map(decode, reply["states"]), strict=True):
                if after is None:
                    continue
                if isinstance(argument, torch.Tensor):
                    argument.data.copy_(after)
                elif isinstance(argument, Probe):
                    argument.log = after
            return decode(reply["result"]), copies
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError):
            self.submission.stop()
            raise LostError(GONE) from None


def grade(path: Path, names: Sequence[str], seeds: Sequence[int], seconds: float) -> tuple[list[Verdict], list[str]]:
    """The verdict on each exercise of these names, and remarks for the teacher."""
    points = {name: load()[name].points for name in names}
    verdicts = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        try:
            if not isinstance(json.loads(path.read_bytes())["cells"], list):
                raise TypeError
            submission = Submission(path, home, seconds)
        except (ValueError, KeyError, TypeError, RecursionError, LostError) as error:
            why = f"the notebook could not be read: {error}" if isinstance(error, LostError) else BROKEN
            return [Verdict(name, 0, points[name], f"not graded: {why}") for name in names], [why]
        for name in names:
            if name in submission.functions:
                verdicts.append(assess(name, RemoteAnswer(submission, name), seeds))
            else:
                verdicts.append(Verdict(name, 0, points[name], "no function of this name was handed in"))
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
    names, seeds = list(load(*notebooks)), [1000 * seed + k for k in range(5)]
    total = sum(load()[name].points for name in names)
    table: list[list[object]] = [["student", *names, "total", "of", "live", "remarks", "seed"]]
    seen: dict[str, str] = {}
    (out / "feedback").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as unpacked:
        folder = unpack(source, Path(unpacked))
        for student, paths in submissions(folder).items():
            graded = [grade(path, names, seeds, seconds) for path in paths]
            columns = zip(*(verdicts for verdicts, _ in graded), strict=True)
            best = [max(verdicts, key=lambda verdict: verdict.earned) for verdicts in columns]
            remarks, earned = [remark for _, some in graded for remark in some], sum(each.earned for each in best)
            files = sorted((folder / student).rglob("*_live.results.json"))
            parts = sorted((live.verdict(path, student, seen) for path in files), key=lambda each: each.earned)
            extra = {each.name: each for each in parts if not notebooks or each.name[:2] in notebooks}
            more = sum(each.earned for each in extra.values())
            safe = f"'{student}" if student[0] in "=+-@" else student  # a spreadsheet takes these for formulas
            table.append([safe, *(each.earned for each in best), earned, total, more, " | ".join(remarks), seed])
            shown = [*best, *extra.values()]
            lines = [f"- {each} ({each.earned} of {each.points})" for each in shown] + [f"- {each}" for each in remarks]
            page = "\n".join([f"# {student}: {earned} of {total} points", "", *lines])
            (out / "feedback" / f"{student}.md").write_text(f"{page}\n", "utf-8")
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
