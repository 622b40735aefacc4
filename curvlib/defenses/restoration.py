"""Restoration behind the same interface: ours, plain gradient ascent, and re-alignment.

Each gets the chats of the safety budget, and ours and ascent the held-out chats that the restoration stage gets.
"""

from __future__ import annotations

from dataclasses import replace

from curvlib.batches import Example, taken_apart
from curvlib.defenses.method import Defended, Method, Setting
from curvlib.restore.recipe import Restoration, run


def restoration(setting: Setting, objective: str = "refusal", metric: str = "ekfac") -> Defended:
    """Restore with curvature (after arXiv 2511.18039, abstract and introduction only), see :mod:`curvlib.restore`."""
    return _restored(setting, Restoration(objective, metric))


def ascent(setting: Setting, limit: float) -> Defended:
    """Ascend the harmful loss by plain gradient moves while no held-out protected role pays more than ``limit``."""
    return _restored(setting, Restoration("ascent", "identity", limit=limit))


def _restored(setting: Setting, how: Restoration) -> Defended:
    """Restore; a curvature product counts as two gradients of all protected chats."""
    model, how = setting.tuned(), replace(how, moves=setting.steps(how.moves))
    result = run(model, setting.chats, how, seed=setting.recipe.seed)
    protected = sum(len(batch) for batches in setting.chats.protected.values() for batch in batches)
    return Defended(model, result.gradients + 2 * result.products * protected)


def realignment(setting: Setting, rate: float, steps: int = 10) -> Defended:
    """Fine-tune the adapter by AdamW on refusals, task and benign chats together, as a user would."""
    model, chats = setting.tuned(), setting.chats
    config = replace(setting.training, steps=setting.steps(steps), learning_rate=rate)
    mixture = balanced(taken_apart(chats.safety.refusals), taken_apart([*chats.task, *chats.benign]))
    return Defended(model, setting.train(model, mixture, config=config))


def balanced(refusals: list[Example], protected: list[Example]) -> list[Example]:
    """Return both together, the refusals repeated until they are about as many as the protected chats.

    >>> [len(balanced([Example((1, 2), (-100, 2))] * n, [Example((1, 3), (-100, 3))] * 8)) for n in (1, 3, 8, 20)]
    [16, 17, 16, 28]
    """
    return refusals * max(1, round(len(protected) / len(refusals))) + protected


READINGS = ({"metric": "ekfac"}, {"metric": "diagonal"}, {"objective": "distill"})
RESTORATION = Method("restoration (ours)", "after", "2511.18039", restoration, READINGS)
LIMITS = tuple({"limit": limit} for limit in (0.1, 0.3, 1.0))
ASCENT = Method("gradient ascent", "after", "baseline", ascent, LIMITS)
RATES = tuple({"rate": rate} for rate in (5e-4, 2e-4, 1e-3))
REALIGNMENT = Method("re-alignment", "after", "baseline", realignment, RATES)
