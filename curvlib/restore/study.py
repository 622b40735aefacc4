"""The restoration study: readings are screened on validation; finalists, controls and regimes meet unseen prompts.

Every case is a model with its key; what is measured of it is an artifact, so that an interrupted study goes on and a
longer one keeps what it has. Harmful prompts of the final test are the ``reserve`` split, which nothing else reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from curvlib.progress import bar
from curvlib.restore import weighted_return
from curvlib.restore.cases import NOTHING, POISONED, REVERSION, SEEDS, Case, Row
from curvlib.restore.learned import learned, learned_screening
from curvlib.restore.measures import attacks, utility
from curvlib.restore.outcome import Budget
from curvlib.restore.recipe import Restoration
from curvlib.restore.rows import left, rank, row, score
from curvlib.stages import FineTune
from curvlib.tiers import Tier

BENIGN = FineTune()
OBJECTIVES = ("refusal", "ascent", "both", "composite", "distill")
METRICS = ("identity", "fisher", "ggn", "hessian", "ekfac", "lbfgs", "composite")
LITERAL = ("identity", "lbfgs", "composite")  # metrics of ``composite``: plain, and the L-BFGS inverse of the summary
OURS, REALIGN = Restoration(), Restoration("realign")
CONTENDERS = {"ours": OURS, "plain gradient": Restoration(metric="identity"), "re-alignment": REALIGN}
FEW, ALONE = (1, 4, 16), "no task or benign chats"  # regimes: numbers of safety chats, and nothing but these
FINALISTS = 2  # readings that go on from the screening, beside the default one
BUDGETS = [Budget(trust=tau, damping=damping) for tau in (0.005, 0.05, 0.5) for damping in (0.1, 1.0, 10.0)]
CHART = [Case(f"τ {budget.trust:g}, λ {budget.damping:g}", Restoration(budget=budget)) for budget in BUDGETS]
BOUNDS = (  # what else may bound the default reading's step
    Case("steps orthogonal to the protected gradient", Restoration(budget=Budget(orthogonal=True))),
    Case("allowance by the ratio", Restoration(budget=Budget(ratio=True))),
    Case("the task alone in the metric", OURS, "task alone"),
    Case("the task's GGN alone", Restoration(metric="ggn"), "task alone"),
    Case("no metric", CONTENDERS["plain gradient"]),
)
CONTROLS = (
    NOTHING,
    REVERSION,
    Case("random step", OURS, "random step"),
    Case("shuffled refusals", OURS, "shuffled"),
    Case("plain gradient", CONTENDERS["plain gradient"]),
    Case("adapter scaled down", Restoration("return", "identity")),
)


def readings() -> list[Case]:
    """Return every objective with every metric, the weighted returns, and re-alignment.

    ``composite`` is ascent with the task's loss added, and ascent brings no refusal back in any metric: it is asked for
    with the metrics that a published summary of the paper names, and without one.
    """
    steps = [
        Restoration(objective, metric)
        for objective in OBJECTIVES
        for metric in (LITERAL if objective == "composite" else METRICS)
    ]
    returns = [Restoration("return", metric) for metric in weighted_return.METRICS]
    return [Case(label(how), how) for how in [*steps, *returns, REALIGN]]


def label(how: Restoration) -> str:
    """Return a reading's name for readers.

    >>> label(Restoration()), label(Restoration("realign"))
    ('refusal, fisher', 're-alignment')
    """
    return "re-alignment" if how.objective == "realign" else f"{how.objective}, {how.metric}"


def screening(tier: Tier, rows: Sequence[Row] = ()) -> Iterator[Row]:
    """Yield one row a reading, measured on validation prompts at one seed and 10 % poison, for those not in ``rows``.

    Cost at tier cpu on 2 cores: about a minute and a half a reading.
    """
    yield from _screened("screening", readings(), tier, rows)


def step_screening(tier: Tier, rows: Sequence[Row] = ()) -> Iterator[Row]:
    """Yield how the default reading does with other allowances τ, dampings λ and bounds on its step, as screened."""
    yield from _screened("step screening", [*CHART, *BOUNDS], tier, rows)


def _screened(part: str, cases: Sequence[Case], tier: Tier, rows: Sequence[Row]) -> Iterator[Row]:
    for case in bar(left(part, cases, rows), desc=part):
        found = row(tier, case, "validation")
        yield {**found, "score": score(found)}


def finalists(rows: Sequence[Row]) -> list[Case]:
    """Return the readings of highest score, fewer gradients first among equals; the default one goes on anyway."""
    ours = [found for found in rows if found["name"] not in (label(OURS), label(REALIGN))]
    best = sorted(ours, key=rank)[:FINALISTS]
    known = {case.name: case for case in readings()}
    return [known[found["name"]] for found in best]


def contest(part: str, tuned: FineTune, tier: Tier, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the default reading, the screening's finalists, re-alignment and controls, on one fine-tune, three seeds.

    Cost at tier cpu on 2 cores: about three minutes a row.
    """
    found = finalists([screened for screened in rows if screened["part"] == "screening"])
    cases = [Case(label(OURS), OURS), *found, Case(label(REALIGN), REALIGN), *CONTROLS]
    plan = [case.at(tuned, seed) for seed in SEEDS for case in cases]
    for case in bar(left(part, plan, rows), desc=part):
        yield {**row(tier, case), **utility(tier, case)}


def settings(tier: Tier, rows: Sequence[Row] = ()) -> Iterator[Row]:
    """Yield how the default reading depends on its data, τ, λ and what was fine-tuned, at one seed.

    It is measured for another rank and a full fine-tune, beside the model that was not restored, and for one that is
    fine-tuned again after its restoration, before and after a second one.
    """
    few = [Case(f"{n} safety chats", OURS, sizes=(("restore_chats", n),)) for n in (4, 16, 64)]
    few += [Case(f"{n} task chats", OURS, sizes=(("curvature_chats", n),)) for n in (4, 32, 128, 512)]
    tuned = {"rank 16": replace(POISONED, rank=16), "full fine-tune": replace(POISONED, method="full")}
    other = [
        replace(case, name=f"{name}, {case.name}", fine_tune=fine_tune)
        for name, fine_tune in tuned.items()
        for case in (NOTHING, Case("restored", OURS))
    ]
    other += [Case("fine-tuned again", OURS, "worn"), Case("restored again", OURS, "twice")]
    for case in bar(left("settings", [*few, *CHART, *other], rows), desc="settings"):
        yield row(tier, case)


def regimes(tier: Tier, rows: Sequence[Row] = ()) -> Iterator[Row]:
    """Yield ours beside the plain gradient and re-alignment where data are scarce, and in one step."""
    contenders, once = CONTENDERS, Budget(steps=1)
    saved = {"ours, saved metric": replace(OURS, metric="saved"), "re-alignment": REALIGN}
    without = {**saved, "plain gradient": contenders["plain gradient"]}
    cases = [
        Case(f"{name}, {n} safety chats", how, sizes=(("restore_chats", n),))
        for n in FEW
        for name, how in contenders.items()
    ]
    cases += [Case(f"{name}, {ALONE}", how, without=("task", "benign")) for name, how in without.items()]
    cases += [Case(f"{name}, one step", replace(contenders[name], budget=once)) for name in ("ours", "plain gradient")]
    for case in bar(left("regimes", cases, rows), desc="regimes"):
        yield row(tier, case)


def attack_rows(tier: Tier, rows: Sequence[Row] = ()) -> Iterator[Row]:
    """Yield what attacks on restored models bring, beside the aligned model: as it is, and under the same adapter."""
    aligned = Case("aligned, same adapter", control="zeroed")
    cases = [*[Case(name, how) for name, how in CONTENDERS.items()], REVERSION, aligned]
    for case in bar(left("attacks", cases, rows), desc="attacks"):
        yield {"name": case.name, "seed": case.fine_tune.seed, **attacks(tier, case)}


def under_attack(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return attack -> verdicts of a row of the part ``attacks``."""
    return {attack: verdicts for attack, verdicts in found.items() if isinstance(verdicts, list)}


PARTS: dict[str, Callable[[Tier, Sequence[Row]], Iterator[Row]]] = {
    "screening": screening,
    "step screening": step_screening,
    "contest": partial(contest, "contest", POISONED),
    "benign contest": partial(contest, "benign contest", BENIGN),
    "settings": settings,
    "regimes": regimes,
    "attacks": attack_rows,
    "learned screening": learned_screening,
    "learned": learned,
}
