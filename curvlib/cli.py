"""The command line: ``python -m curvlib run``, ``restore``, ``align`` and ``exercises``."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from curvlib.cache import disk_is_full
from curvlib.errors import CurvlibError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status.

    0: all went well; 1: a notebook failed, or a mistake told in one line on stderr; 2: wrong usage (argparse);
    130: interrupted.
    """
    options = parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except CurvlibError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted: give the same command again to resume, finished notebooks and stages are kept")
        return 130
    except OSError as error:
        if not disk_is_full(error):
            raise
        where = error.filename or "the run's folder"
        return _fail(f"the disk is full at {where}: free some space and give the same command again to resume")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; --help does not load torch
            raise
        first = str(error).partition(". ")[0]
        return _fail(f"{first}: give shorter chats or a smaller model, restore --dry-run tells what it needs")


def parser() -> argparse.ArgumentParser:
    """Every subcommand with its options; ``options.command`` is the function that serves it."""
    top = argparse.ArgumentParser(prog="python -m curvlib", description="Run the notebooks, restore an adapter.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the notebooks and write runs/TIER/seedSEED/report.html")
    run.add_argument("--tier", default="cpu", help="ci, cpu (default) or gpu")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--only", default="", metavar="NN,NN", help="numbers or words of names, such as 01,A1,influence")
    run.add_argument("--studies", action="store_true", help="run notebooks/studies instead, into runs/studies")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a notebook parameter")
    run.add_argument("--limit", type=float, default=3.0, metavar="HOURS", help="stop a notebook after this; default: 3")
    run.add_argument("--fresh", action="store_true", help="run also what an earlier run completed")
    run.add_argument("--keep-outputs", action="store_true", help="copy the outputs into the source notebooks")
    run.set_defaults(command=_run)

    _add_restore(commands)

    align = commands.add_parser("align", help="teach SmolLM2 refusals that survive an agreeing beginning")
    align.add_argument("--seed", type=int, default=0)
    align.add_argument("--shallow", action="store_true", help="leave the recovery examples out")
    align.set_defaults(command=_align)

    _add_exercises(commands)
    return top


def _add_restore(commands: Any) -> None:
    restore = commands.add_parser("restore", help="bring refusals back to a fine-tuned LoRA adapter")
    restore.add_argument("--base", required=True, help="the aligned model: smollm2, qwen, a Hub id or a folder")
    restore.add_argument("--adapter", required=True, type=Path, help="folder or Hub id of a peft adapter; only read")
    restore.add_argument("--task", required=True, type=Path, help="JSONL, JSON, CSV, Parquet, Hub id: what must stay")
    restore.add_argument("--out", required=True, type=Path, help="new folder for the restored adapter")
    restore.add_argument("--harmful", type=Path, help="prompts, perhaps with refusals; default: our own")
    restore.add_argument("--benign", type=Path, help="prompts that must not be refused; default: our own")
    how = "share of the way back to the base's log-odds of refusing, more than 0 and at most 1; default: 0.7"
    restore.add_argument("--strength", type=float, default=0.7, help=how)
    deep = "stop where the mean log-odds of refusing on validation requests reaches NATS, in place of --strength"
    restore.add_argument("--depth", type=float, metavar="NATS", help=deep)
    stress = "attack the result by relearning, eight steps, and tell how long its refusals last; nothing more is kept"
    restore.add_argument("--stress", action="store_true", help=stress)
    restore.add_argument("--limit", type=float, metavar="NATS", help="most that task or benign chats may pay a token")
    restore.add_argument("--objective", default="refusal", choices=("refusal", "distill"))
    metrics = ("ekfac", "diagonal", "fisher", "ggn", "hessian", "lbfgs", "identity")
    restore.add_argument(
        "--metric", default="ekfac", choices=metrics, help="what a move is measured by; default: ekfac"
    )
    restore.add_argument("--dry-run", action="store_true", help="tell rows, memory and time, and stop")
    restore.add_argument("--seed", type=int, default=0)
    restore.add_argument("--device", help="cpu or cuda; default: cuda where there is a GPU")
    restore.set_defaults(command=_restore)


def _add_exercises(commands: Any) -> None:
    kit = commands.add_parser("exercises", help="release the exercises to students, grade what they hand in")
    actions = kit.add_subparsers(required=True, metavar="ACTION", dest="action")
    actions.add_parser("release", help="write notebooks/exercises, and runs/release/exercises.zip without solutions")
    convert = actions.add_parser("nbgrader", help="write the source folder of an nbgrader course")
    convert.add_argument("course", type=Path, metavar="COURSE")
    grade = actions.add_parser("grade", help="write grades.csv and a page of feedback for each student")
    grade.add_argument("source", type=Path, metavar="FOLDER_OR_ZIP", help="NAME.ipynb or a folder NAME each")
    grade.add_argument("--only", default="", metavar="NN,NN", help="notebook numbers, such as 03,04; default: all")
    grade.add_argument("--out", type=Path, default=Path("runs/grades"))
    grade.add_argument("--seed", type=int, help="of the numbers that the checks draw; default: a fresh one")
    grade.add_argument("--seconds", type=float, default=10, help="for one call of an answer")
    kit.set_defaults(command=_exercises)


def _exercises(options: argparse.Namespace) -> int:
    from curvlib.exercises import grade, nbgrader, release  # here, so that --help does not wait for torch

    if options.action == "grade":
        seed = secrets.randbelow(10**6) if options.seed is None else options.seed
        only = options.only.split(",") if options.only else ()
        print(f"{grade.grade_class(options.source, options.out, only, seed, options.seconds)}, seed {seed}")
    elif options.action == "nbgrader":
        print(f"{nbgrader.convert(Path('notebooks/solutions'), options.course)} notebooks in {options.course}/source")
    else:
        archive = Path("runs/release/exercises.zip")
        print(f"{release.release(Path('notebooks'), archive)} notebooks in notebooks/exercises, and in {archive}")
    return 0


def _restore(options: argparse.Namespace) -> int:
    from curvlib.restore.door import Request, restore_adapter
    from curvlib.restore.recipe import Restoration

    names = ("base", "adapter", "task", "out", "harmful", "benign", "depth", "stress", "seed", "device", "dry_run")
    how = Restoration(options.objective, options.metric, options.strength, options.limit)
    print(restore_adapter(Request(**{name: getattr(options, name) for name in names}, how=how)))
    if not options.dry_run:
        print(f"the restored adapter is in {options.out}, with restoration.json and restoration.png")
    return 0


def _align(options: argparse.Namespace) -> int:
    from curvlib import aligned  # here, so that --help does not wait for it

    recipe = replace(aligned.SHALLOW if options.shallow else aligned.Alignment(), seed=options.seed)
    folder = aligned.align(recipe)
    print(f"the adapter is in {folder}; on validation prompts:")
    print((folder / "recipe.json").read_text("utf-8"), end="")
    return 0


def _run(options: argparse.Namespace) -> int:
    from curvlib.report import ROOT
    from curvlib.runner import run  # here, so that --help does not wait for it

    outcomes = run(
        options.tier,
        options.seed,
        options.only.split(",") if options.only else (),
        parameters={name: _literal(value) for name, value in options.p},
        fresh=options.fresh,
        keep_outputs=options.keep_outputs,
        hours=options.limit,
        notebooks=ROOT / "notebooks" / ("studies" if options.studies else ""),
        runs=ROOT / "runs" / ("studies" if options.studies else ""),
    )
    failed = [outcome.notebook for outcome in outcomes if outcome.fault]
    return _fail(f"{len(failed)} of {len(outcomes)} notebooks failed: {', '.join(failed)}") if failed else 0


def _literal(text: str) -> object:
    """A number, true, false or null as JSON or Python has it; any other text as it is."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def _fail(message: str) -> int:
    print(f"curvlib: error: {message}", file=sys.stderr)
    return 1
