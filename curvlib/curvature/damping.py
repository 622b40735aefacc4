r"""How much damping: the λ whose step is the cheapest on chats that the curvature was not fitted to.

A step v towards safety, with g its gradient, raises the protected loss by :math:`\tfrac12 v^\top F v` for a gain
:math:`g^\top v`; whatever its length, it costs :math:`(v^\top F v) / (g^\top v)^2` for each squared unit of gain. The
protected chats are split in two. C is fitted to one half, F is the Fisher matrix of the other, and among

.. math:: v_\lambda = (C + \lambda I)^{-1} g, \qquad \lambda \text{ over six decades around C's own mean eigenvalue,}

the cheapest one is taken. Its cost over that of the plain step, v = g, says what the metric buys. Nothing here looks at
behaviour. Roles (task chats, benign chats) count with equal traces, whatever their numbers of tokens.

A small λ walks far along what looks flat, and few held-out chats cannot tell it from a larger one. So where steps are
taken the rule is that of one standard error, as for regularisation chosen by cross-validation (Breiman et al., 1984):
the largest λ whose price is within one standard error, over chats, of the least.

A study of prices fits, rules, steps and measures in a few lines::

    halves = protected_halves(model, {"task": task, "benign": benign}, seed=seed)
    gradient = objectives.gradient(model, objectives.terms("refusal", safety), list(trainable(model).values()))
    for name in ("identity", "diagonal", "ekfac", "ggn"):
        inverse, damping = damped_by_rule(name, model, halves, gradient, seed=seed)
        step = -gain * damping.direction / float(gradient @ damping.direction)   # a linear gain of so many nats
        print(name, damping, {role: price(model, step, chats) for role, chats in held_out.items()})

Influence asks the same of a query: g is its gradient, and the roles are ``{"training": chats}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from curvlib.batches import Batch, answer_logits, at_least_float32
from curvlib.curvature.inverse import Fit, Inverse, fit
from curvlib.curvature.lowrank import LowRankOperator, sampled_fisher
from curvlib.curvature.operator import CurvatureOperator
from curvlib.errors import CurvlibError
from curvlib.nf4 import kept_weights
from curvlib.parameters import shifted, trainable

DECADES = tuple(10 ** (power / 2) for power in range(-8, 5))  # λ in units of the mean eigenvalue: 1e-4 to 100
IDENTITY = 0.9  # a metric whose step costs more than this share of the plain one is called the identity


@dataclass(frozen=True)
class Half:
    """Half of the protected chats: batches, a weight each that gives all roles one trace, and their sampled Fisher."""

    batches: list[Batch]
    weights: list[float]
    fisher: LowRankOperator


@dataclass(frozen=True)
class Damping:
    r"""What the rule chose, and what it costs.

    Attributes:
        name: of the metric.
        value: λ; infinite for the identity.
        unit: mean eigenvalue of C.
        ratio: held-out price of the step over that of the plain step.
        cosine: between both steps.
        above: eigenvalues of C above λ; None where they are not known.
        direction: :math:`(C + \lambda I)^{-1} g`, (P,).
        tried: λ -> its ratio.
    """

    name: str
    value: float
    unit: float
    ratio: float
    cosine: float
    above: int | None
    direction: Tensor = field(repr=False)
    tried: dict[float, float] = field(default_factory=dict, repr=False)

    @property
    def is_identity(self) -> bool:
        """Whether the metric buys too little to be told from the plain gradient."""
        return not self.ratio <= IDENTITY

    def __str__(self) -> str:
        name = f"{self.name}, in effect the identity" if self.is_identity and self.name != "identity" else self.name
        above = "an unknown number of" if self.above is None else f"{self.above:,}"
        return (
            f"{name}: λ = {self.value:.2g} ({self.value / self.unit:.2g} mean eigenvalues, {above} eigenvalues above), "
            f"cosine to the plain step {self.cosine:.3f}, held-out price {self.ratio:.2f} of its"
        )


def rate(operator: CurvatureOperator, gradient: Tensor, v: Tensor) -> float:
    r"""Return :math:`(v^\top F v) / (g^\top v)^2`; infinite for a step that gains nothing."""
    gain = float(gradient @ v)
    return float(v @ operator.matvec(v)) / gain**2 if gain > 0 else float("inf")


def standard_error(operator: LowRankOperator, gradient: Tensor, v: Tensor) -> float:
    """Return that of :func:`rate`, a sum over the operator's rows, one a chat."""
    parts = (operator.rows @ v).square() / float(gradient @ v) ** 2
    return float(parts.std()) * math.sqrt(len(parts))


def choose_damping(
    fitted: Fit, held_out: CurvatureOperator, gradient: Tensor, *, errors: float = 0.0, products: int = 30
) -> Damping:
    """Return the damping of least held-out price, or the largest of those that are as good.

    Memory: a vector (P,) for each λ that is as good.

    Args:
        fitted: the curvature C.
        held_out: F, the curvature of other chats.
        gradient: g (P,), of the loss that is to fall.
        errors: standard errors of the least price within which a price is as good; more than 0 asks F for its rows.
        products: most products with C where it is not inverted exactly; all λ share them.

    Raises:
        CurvlibError: the gradient or its price is zero or not finite.
    """
    plain = rate(held_out, gradient, gradient)
    if not 0 < plain < float("inf"):
        raise CurvlibError(f"the plain step has price {plain}, expected a positive number: check gradient and chats")
    if fitted.operator is None:
        return Damping(fitted.name, float("inf"), 1.0, 1.0, 1.0, None, gradient)
    unit, tried, good, bound = fitted.unit, dict[float, float](), dict[float, Tensor](), float("inf")
    dampings = [unit * factor for factor in reversed(DECADES)]
    for damping, v in zip(dampings, fitted.solutions(gradient, dampings, products=products), strict=True):
        tried[damping] = rate(held_out, gradient, v) / plain
        if tried[damping] == min(tried.values()):
            error = standard_error(held_out, gradient, v) if isinstance(held_out, LowRankOperator) else 0.0
            bound = tried[damping] + errors * error / plain
        good = {known: w for known, w in {**good, damping: v}.items() if tried[known] <= bound}
    value = max(good)
    cosine = float(torch.cosine_similarity(good[value], gradient, dim=0))
    return Damping(fitted.name, value, unit, tried[value], cosine, fitted.above(value), good[value], tried)


def protected_halves(
    model: nn.Module, roles: Mapping[str, Sequence[Batch]], *, draws: int = 1, seed: int = 0
) -> tuple[Half, Half]:
    """Return both halves of the protected chats, by role: to fit to, and to hold out.

    Cost: one gradient of all chats and a backward pass for each further draw of labels; memory: one row (P,) a chat and
    draw.

    Raises:
        CurvlibError: a role has a single chat, or none.
    """
    parts: tuple[dict[str, list[Batch]], ...] = ({}, {})
    for role, batches in roles.items():
        for half, part in zip(parts, halves(batches), strict=True):
            half[role] = part
    first, second = (_equal_traces(model, part, draws, seed + number) for number, part in enumerate(parts))
    return first, second


def halves(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return two halves of the chats, cut through every batch."""
    first: list[Batch] = []
    second: list[Batch] = []
    for batch in batches:
        few, more = sorted((first, second), key=lambda half: sum(map(len, half)))
        middle = (len(batch) + 1) // 2
        few.append(batch.rows(0, middle))
        if middle < len(batch):
            more.append(batch.rows(middle, len(batch)))
    if not (first and second):
        raise CurvlibError("a role has fewer than two chats, expected one to fit to and one to hold out: give more")
    return first, second


def _equal_traces(model: nn.Module, roles: Mapping[str, Sequence[Batch]], draws: int, seed: int) -> Half:
    batches = [batch for chats in roles.values() for batch in chats]
    fisher = sampled_fisher(model, batches, samples=draws, seed=seed)
    shares = torch.stack([row.square().sum() for row in fisher.rows]).split([draws * len(batch) for batch in batches])
    owners = [role for role, chats in roles.items() for _ in chats]
    traces = dict.fromkeys(roles, 0.0)
    for role, share in zip(owners, shares, strict=True):
        traces[role] += float(share.sum())
    mean = sum(traces.values()) / len(traces)
    weights = [mean / traces[role] for role in owners]
    for rows, weight in zip(fisher.rows.split([len(share) for share in shares]), weights, strict=True):
        rows *= weight**0.5
    return Half(batches, weights, fisher)


def damped_by_rule(
    name: str,
    model: nn.Module,
    protected: tuple[Half, Half],
    gradient: Tensor,
    *,
    products: int = 30,
    seed: int = 0,
) -> tuple[Inverse, Damping]:
    """Return the damped inverse of the first half's curvature, with λ by one standard error on the second half.

    Args:
        name: see :mod:`curvlib.curvature.inverse`.
        model: where the curvature is taken.
        protected: from :func:`protected_halves`; serves several names.
        gradient: g (P,), of the loss that is to fall.
        products: most products of an iterative solve.
        seed: of EK-FAC's labels.

    The inverse serves other gradients too, such as those of later steps; what was priced is ``Damping.direction``.
    """
    fitting, held_out = protected
    fitted = fit(name, model, fitting.batches, weights=fitting.weights, fisher=fitting.fisher, seed=seed)
    damping = choose_damping(fitted, held_out.fisher, gradient, errors=1.0, products=products)
    return fitted.inverse(damping.value, products=products), damping


@torch.no_grad()
def price(model: nn.Module, step: Tensor, batches: Sequence[Batch]) -> float:
    r"""Return :math:`\mathrm{KL}(p_\theta \,\|\, p_{\theta + \delta})` in nats per answer token of the chats.

    The model stands at θ, where the fine-tune left it, and is put back. For a short step the price is
    :math:`\tfrac12 \delta^\top F \delta`. Cost: two forward passes of all chats.
    """
    total = 0.0
    with kept_weights(model):
        for batch in batches:
            before = at_least_float32(answer_logits(model, batch)).log_softmax(dim=-1)
            with shifted(trainable(model), step):
                after = at_least_float32(answer_logits(model, batch)).log_softmax(dim=-1)
            total += float(kl_div(after, before, reduction="sum", log_target=True))
    return total / sum(batch.tokens for batch in batches)
