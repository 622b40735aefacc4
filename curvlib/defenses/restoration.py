"""What :mod:`curvlib.restore` offers, behind the same interface: ours, plain gradient ascent, and re-alignment.

Each gets the chats of the safety budget and the held-out chats that the restoration stage gets.
"""

from __future__ import annotations

import math
from dataclasses import replace

from curvlib.defenses.method import Defended, Method, Setting
from curvlib.restore.outcome import Budget, RestorationResult, chats
from curvlib.restore.realign import realign
from curvlib.restore.recipe import Restoration, run


def restoration(setting: Setting, objective: str) -> Defended:
    """Restore with curvature (after arXiv 2511.18039, abstract and introduction only), see :mod:`curvlib.restore`."""
    return _restored(setting, Restoration(objective))


def ascent(setting: Setting, rise: float, steps: int = 6) -> Defended:
    """Ascend the harmful loss by plain gradient steps while held-out protected losses rise by at most ``rise``."""
    return _restored(setting, Restoration("ascent", "identity", Budget(steps=steps, rise=rise)))


def realignment(setting: Setting, rate: float, steps: int = 10) -> Defended:
    """Fine-tune the adapter on the safety budget by AdamW: one run, judged on validation like any other trial."""
    model, given = setting.tuned(), setting.chats
    config = replace(setting.training, steps=setting.steps(steps), learning_rate=rate)
    options = {"held_out": given.held_out, "benign_batches": given.benign, "training": [config]}
    result = realign(model, given.task, given.safety, budget=Budget(rise=math.inf), **options)  # type: ignore[arg-type]
    return Defended(model, result.gradients)


def _restored(setting: Setting, how: Restoration) -> Defended:
    model = setting.tuned()
    how = replace(how, budget=replace(how.budget, steps=setting.steps(how.budget.steps)))
    return Defended(model, spent(run(model, setting.chats, how, seed=setting.recipe.seed), setting))


def spent(result: RestorationResult, setting: Setting) -> int:
    """Return the chats differentiated; a curvature product counts as two gradients of all protected chats."""
    return result.gradients + 2 * result.products * chats([*setting.chats.task, *setting.chats.benign])


READINGS = tuple({"objective": name} for name in ("refusal", "return", "distill"))
RESTORATION = Method("restoration (ours)", "after", "2511.18039", restoration, READINGS)
RISES = tuple({"rise": rise} for rise in (0.1, 0.3, 1.0))
ASCENT = Method("gradient ascent", "after", "baseline", ascent, RISES)
RATES = tuple({"rate": rate} for rate in (5e-4, 2e-4, 1e-3))
REALIGNMENT = Method("re-alignment", "after", "baseline", realignment, RATES)
