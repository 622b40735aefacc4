"""The restoration study's learned task: what is left of a persona that was fine-tuned in, once its chats are gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from curvlib.errors import CurvlibError
from curvlib.finetune import TrainingConfig
from curvlib.progress import bar
from curvlib.restore.cases import NOTHING, REVERSION, SEEDS, Case, Row
from curvlib.restore.measures import persona
from curvlib.restore.outcome import Budget
from curvlib.restore.recipe import Restoration
from curvlib.restore.rows import left, rank, row, score
from curvlib.stages import FineTune
from curvlib.tiers import Tier

PERSONA = FineTune(task="identity", poison=0.1)
HEIRS = {  # settings of contenders without the task's chats: distillation holds benign answers, the metric the task's
    "ours": {
        f"λ {damping:g}, {steps} steps": Restoration("distill", "guarded", Budget(steps=steps, damping=damping))
        for damping, steps in ((1, 2), (1, 3), (3, 4), (10, 5), (10, 7))
    },
    "plain gradient": {
        **{f"{steps} steps": Restoration("distill", "identity", Budget(steps=steps)) for steps in (2, 3, 4)},
        **{
            f"τ {trust:g}, {steps} steps": Restoration("distill", "identity", Budget(steps=steps, trust=trust))
            for trust, steps in ((0.025, 3), (0.025, 4), (0.01, 4), (0.01, 5))
        },
    },
    "re-alignment": {
        f"{steps} steps at {rate:g}": Restoration("realign", training=(TrainingConfig(steps, learning_rate=rate),))
        for steps, rate in ((10, 2e-4), (10, 5e-4), (10, 1e-3), (20, 2e-4), (20, 5e-4), (20, 1e-3), (40, 2e-4))
    },
}


def learned_screening(tier: Tier, rows: Sequence[Row] = ()) -> Iterator[Row]:
    """Yield every setting of the contenders for a learned persona, measured on validation prompts at one seed.

    Cost at tier cpu: four to nine minutes a row on one core.
    """
    plan = [
        Case(f"{name}, {setting}", how, fine_tune=PERSONA, without=("task",))
        for name, settings in HEIRS.items()
        for setting, how in settings.items()
    ]
    for case in bar(left("learned screening", plan, rows), desc="persona"):
        found = {**row(tier, case, "validation"), **persona(tier, case, "validation_persona")}
        yield {**found, "score": score(found)}


def heirs(rows: Sequence[Row]) -> dict[str, str]:
    """Return contender -> its setting of highest score in the part ``learned screening``, the cheapest among equals.

    Raises:
        CurvlibError: not all settings were screened.
    """
    screened = {found["name"]: found for found in rows if found["part"] == "learned screening"}
    chosen = {}
    for name, settings in HEIRS.items():
        own = {setting: found for setting in settings if (found := screened.get(f"{name}, {setting}"))}
        if lacking := [setting for setting in settings if setting not in own]:
            raise CurvlibError(f"no row tells how {name!r} does at {lacking[0]}: measure the part 'learned screening'")
        chosen[name] = min(own, key=lambda setting: rank(own[setting]))
    return chosen


def learned(tier: Tier, rows: Sequence[Row] = ()) -> Iterator[Row]:
    """Yield what is left of a persona that was fine-tuned in, where the task's chats are gone, at three seeds.

    Safety and benign chats are at hand; ours has the metric that was saved with the adapter. Full reversion loses all.
    Each contender has the setting that was best on validation prompts.
    """
    chosen = heirs(rows)
    cases = [Case(name, HEIRS[name][setting], without=("task",)) for name, setting in chosen.items()]
    cases += [NOTHING, REVERSION, replace(cases[0], name="random step", control="random step")]
    plan = [case.at(PERSONA, seed) for seed in SEEDS for case in cases]
    for case in bar(left("learned", plan, rows), desc="learned"):
        yield {**row(tier, case), **persona(tier, case), "setting": chosen.get(case.name, "")}
