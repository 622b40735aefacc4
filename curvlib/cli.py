"""The command line: ``python -m curvlib run``, ``report``, ``restore``, ``align`` and ``study``."""

from __future__ import annotations

import argparse
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


def parser() -> argparse.ArgumentParser:
    """Every subcommand with its options; ``options.command`` is the function that serves it."""
    top = argparse.ArgumentParser(prog="python -m curvlib", description="Run the notebooks, restore an adapter.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the notebooks and write runs/TIER/seedSEED/report.html")
    run.add_argument("--tier", default="cpu", help="ci, cpu (default) or gpu")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--only", default="", metavar="NN,NN", help="notebook numbers, such as 01,04,A1")
    run.add_argument("--fresh", action="store_true", help="run also what an earlier run completed")
    run.add_argument("--keep-outputs", action="store_true", help="copy the outputs into the source notebooks")
    run.set_defaults(command=_run)

    report = commands.add_parser("report", help="write report.html again from a finished run")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.set_defaults(command=_report)
    _add_restore(commands)

    align = commands.add_parser("align", help="teach SmolLM2 refusals that survive an agreeing beginning")
    align.add_argument("--seed", type=int, default=0)
    align.add_argument("--shallow", action="store_true", help="leave the recovery examples out")
    align.set_defaults(command=_align)

    study = commands.add_parser("study", help="run a study and write data/studies/NAME.json")
    study.add_argument("name", metavar="NAME", help="degradation, influence, landscape, methods or restoration")
    study.add_argument("--tier", default="cpu", help="ci, cpu (default) or gpu")
    study.add_argument("--only", default="", metavar="PART,PART", help="parts to measure; the file keeps the others")
    study.set_defaults(command=_study)
    return top


def _add_restore(commands: Any) -> None:
    restore = commands.add_parser("restore", help="bring refusals back to a fine-tuned LoRA adapter")
    restore.add_argument("--base", required=True, help="the aligned model: smollm2, a Hub id or a folder")
    restore.add_argument("--adapter", required=True, type=Path, help="folder of the adapter in peft format; only read")
    restore.add_argument("--task", required=True, type=Path, help='JSONL, {"messages": […]} a line: what must stay')
    restore.add_argument("--out", required=True, type=Path, help="new folder for the restored adapter")
    restore.add_argument("--harmful", type=Path, help="JSONL of prompts, perhaps with refusals; default: our own")
    restore.add_argument("--benign", type=Path, help="JSONL of prompts that must not be refused; default: our own")
    restore.add_argument("--objective", default="refusal", choices=("refusal", "distill", "return", "realign"))
    restore.add_argument(
        "--metric", default="fisher", choices=("fisher", "ggn", "hessian", "ekfac", "lbfgs", "identity")
    )
    restore.add_argument("--rise", type=float, default=0.1, help="most nats per token that a protected loss may rise")
    restore.add_argument("--seed", type=int, default=0)
    restore.add_argument("--device", help="cpu or cuda; default: cuda where there is a GPU")
    restore.set_defaults(command=_restore)


def _restore(options: argparse.Namespace) -> int:
    from curvlib.restore.door import Request, restore_adapter, table
    from curvlib.restore.outcome import Budget
    from curvlib.restore.recipe import Restoration

    given = {name: getattr(options, name) for name in ("base", "adapter", "task", "out", "harmful", "benign")}
    how = Restoration(options.objective, options.metric, Budget(rise=options.rise))
    print(table(restore_adapter(Request(**given, how=how, seed=options.seed, device=options.device))))
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
    from curvlib.runner import run  # here, so that --help does not wait for it

    only = options.only.split(",") if options.only else ()
    outcomes = run(options.tier, options.seed, only, fresh=options.fresh, keep_outputs=options.keep_outputs)
    failed = [outcome.notebook for outcome in outcomes if outcome.state == "failed"]
    return _fail(f"{len(failed)} of {len(outcomes)} notebooks failed: {', '.join(failed)}") if failed else 0


def _report(options: argparse.Namespace) -> int:
    from curvlib.report_page import build_report

    print(build_report(options.run_dir))
    return 0


def _study(options: argparse.Namespace) -> int:
    from curvlib.studies import run_study  # here, so that --help does not wait for it

    print(run_study(options.name, options.tier, options.only.split(",") if options.only else ()))
    return 0


def _fail(message: str) -> int:
    print(f"curvlib: error: {message}", file=sys.stderr)
    return 1
