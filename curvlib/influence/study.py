"""The influence study: leave-one-out on toys, half-subset retrainings of the 4-bit model, poison found and removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlib import stages
from curvlib.errors import CurvlibError
from curvlib.evaluate.scorecard import Scorecard, scorecard, stage_scorecard
from curvlib.influence import recipe as recipes
from curvlib.influence import retraining, validate
from curvlib.influence.gradients import example_gradients, query_gradients
from curvlib.influence.recipe import BASELINES, DIRECT, ITERATIVE, Method
from curvlib.influence.scores import METHODS, build_inverse, cosine, influence
from curvlib.influence.toys import Toy, fit, retrainer, toy
from curvlib.parameters import flatten, trainable
from curvlib.progress import bar
from curvlib.stages import FineTune
from curvlib.tiers import Tier

Row = dict[str, Any]
SEEDS = (0, 1, 2)
RIDGE = 0.03  # of the toy transformer's objective, and so the damping of every method there
FACTORS = (0.01, 0.1, 1.0)  # of the damping rule
POISON = 0.1
SHOWN = 5  # benign chats of highest rank whose first words a row keeps
TRAINED = ("fisher", "fisher, half way", "random")  # rankings without whose highest chats every fine-tune is made again


def convex_rows(seeds: Sequence[int] = SEEDS) -> list[Row]:
    """Return for each seed the rank correlation of influence with exact leave-one-out, in ridge regression."""
    rows = []
    for seed in seeds:
        exact, predicted = ridge_case(seed)
        found = validate.rank_correlations(predicted.numpy(), exact.numpy()).mean()
        shuffled = predicted[:, np.random.default_rng(seed).permutation(predicted.shape[1])]
        control = validate.rank_correlations(shuffled.numpy(), exact.numpy()).mean()
        rows.append({"seed": seed, "spearman": float(found), "control": float(control)})
    return rows


def ridge_case(seed: int, points: int = 100) -> tuple[Tensor, Tensor]:
    """Return the exact and the predicted effects (8, points) of random points in five dimensions on eight queries.

    The queries' targets are as noisy as the points'. A query that the fit meets by chance has no gradient, and then the
    first order says nothing: with 40 points one such query of eight took the mean rank correlation to 0.85.
    """
    generator = torch.Generator().manual_seed(seed)
    x, queries = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for rows in (points, 8))
    truth = torch.randn(5, generator=generator, dtype=torch.float64)
    y, targets = (
        inputs @ truth + torch.randn(len(inputs), generator=generator, dtype=torch.float64) for inputs in (x, queries)
    )
    return validate.ridge_leave_one_out(x, y, queries, targets, ridge=0.1)


def transformer_rows(seeds: Sequence[int] = SEEDS) -> list[Row]:
    """Return for each seed and method how well it orders the effects of leaving one chat out of the toy."""
    rows = []
    for seed in bar(seeds, desc="toys"):
        _, actual, found = transformer_case(seed)
        for name, values in found.items():
            spearman = float(validate.rank_correlations(values.double().numpy(), actual.numpy()).mean())
            rows.append({"seed": seed, "method": name, "spearman": spearman, "n": actual.numel()})
    return rows


def transformer_case(seed: int, methods: Sequence[str] = METHODS) -> tuple[Toy, Tensor, dict[str, Tensor]]:
    """Return the toy at its optimum, the measured effects of leaving one out, and those that each method predicts.

    Shapes (m, n). Cost: n + 1 fits of the toy, some five seconds.
    """
    case = toy(seed=seed)
    anchor, everything = flatten(trainable(case.model)), range(len(case.examples))
    fit(case.model, case.examples, everything, ridge=RIDGE, anchor=anchor, steps=300)
    retrain = retrainer(case.model, case.examples, case.queries, ridge=RIDGE, anchor=anchor)
    actual = validate.leave_one_out(retrain, len(case.examples))
    rows, wanted = example_gradients(case.model, case.examples), query_gradients(case.model, case.queries)
    found = {
        name: influence(rows, wanted, build_inverse(name, case.model, case.examples, damping=RIDGE)) for name in methods
    }
    return case, actual, {**found, "cosine": cosine(rows, wanted)}


def subset_rows(tier: Tier, found: Sequence[Row] = ()) -> Iterator[Row]:
    """Yield one row a random half of the training set: each query's loss after training on it, for those not there yet.

    Cost at tier cpu: 100 fine-tunes of half length, a minute and a half each on one core.
    """
    known = {row["subset"] for row in found if row["part"] == "subsets"}
    chosen = validate.subsets(tier.tune_examples, tier.influence_subsets)
    for number in bar([number for number in range(len(chosen)) if number not in known], desc="subsets"):
        losses = retraining.query_losses(tier, FineTune(poison=POISON), chosen[number])
        yield {"subset": number, "losses": losses}


def datamodeling_rows(tier: Tier, found: Sequence[Row]) -> list[Row]:
    """Return for each method and damping its linear datamodeling score on the 4-bit model, with its cost.

    Scores of every query are compared query by query; ``mean`` is the score on the mean of the queries, which is all
    that iterative solvers are asked for. ``gain`` and ``mean_gain`` are what each is above the plain dot product of
    gradients, on the same subsets. Rows called ``half way`` take all gradients at half the adapter.

    Raises:
        CurvlibError: the part ``subsets`` is not whole.
    """
    recipe, runs = FineTune(poison=POISON), {row["subset"]: row["losses"] for row in found if row["part"] == "subsets"}
    chosen = validate.subsets(tier.tune_examples, tier.influence_subsets)
    if len(runs) < len(chosen):
        raise CurvlibError(f"{len(runs)} of {len(chosen)} retrainings were made: measure the part 'subsets' first")
    methods = [Method(name, factor) for name in DIRECT for factor in FACTORS]
    methods += [Method(name) for name in (*ITERATIVE, *BASELINES)]
    early = [*recipes.HALFWAY, Method("ekfac")]
    scored = recipes.scores(tier, recipe, methods) | recipes.scores(tier, recipe, early, halfway=True)
    losses = torch.tensor([runs[number] for number in range(len(chosen))], dtype=torch.float64).T
    plain = scored["dot product"].values.double()

    def columns(name: str, gain: str, one: Tensor, other: Tensor, measured: Tensor) -> Row:
        over = validate.datamodeling_gain(one, other, chosen, measured).columns(gain)
        return validate.datamodeling_score(one, chosen, measured).columns(name) | over

    rows = []
    for method, (label, scores) in zip([*methods, *early], scored.items(), strict=True):
        values = scores.values.double()
        mean = columns("mean", "mean_gain", *(found.mean(dim=0)[None] for found in (values, plain, losses)))
        alone = {f"lds_{end}": mean[f"mean_{end}"] for end in ("value", "low", "high", "n")}
        if len(values) == len(losses):
            alone = columns("lds", "gain", values, plain, losses)
        head = {"method": method.name, "factor": method.factor, "label": label}
        rows.append({**head, **alone, **mean, **scores.costs})
    return rows


def all_removal_rows(tier: Tier, found: Sequence[Row] = ()) -> Iterator[Row]:
    """Yield :func:`removal_rows` of each poisoned fine-tune and of a benign one, where ``found`` lacks them."""
    for recipe in (*(FineTune(poison=POISON, seed=seed) for seed in SEEDS), FineTune(poison=0.0)):
        own = [row for row in found if row["part"] == "removal"]
        known = [row["removed"] for row in own if (row["poison"], row["seed"]) == (recipe.poison, recipe.seed)]
        yield from removal_rows(tier, recipe, known)


def removal_rows(tier: Tier, recipe: FineTune, known: Sequence[str] = ()) -> Iterator[Row]:
    """Yield one row a ranking: how it finds the poison, and the model trained without what it ranks highest.

    Trained again are :data:`TRAINED` rankings, and all of them once, with poison at the first seed. A benign set is
    ranked at the end of training alone, and its rows hold the first words of the chats ranked ``highest``.

    Args:
        tier: sizes; as many chats are removed as a poisoned fine-tune has poisoned ones.
        recipe: the poisoned fine-tune, or a benign one.
        known: rankings to leave out.
    """
    examples, poisoned = recipes.training_set(tier, recipe)
    count, scored = round(POISON * tier.tune_examples), recipes.all_scores if recipe.poison else recipes.scores
    found = scored(tier, recipe)
    if "nothing" not in known:
        yield _behaviour_row("nothing", recipe, stage_scorecard(tier, recipe))
    if recipe.poison and "clean fine-tune" not in known:
        clean = stage_scorecard(tier, FineTune(poison=0.0, seed=recipe.seed))
        yield _behaviour_row("clean fine-tune", recipe, clean)
    found = {label: one for label, one in found.items() if recipe.poison or label in TRAINED}
    for label, scores in bar([one for one in found.items() if one[0] not in known], desc="removal"):
        row: Row = {}
        if recipe.poison:
            row = validate.auroc(scores.suspicion, poisoned).columns("auroc")
            row["precision"] = validate.precision_at(scores.suspicion, poisoned, count)
        highest = validate.most_suspicious(scores.suspicion, count)
        if not recipe.poison:
            row["highest"] = recipes.prompt_excerpts(tier, [examples[number] for number in highest[:SHOWN]])
        if label in TRAINED or recipe.seed == 0:
            kept = retraining.without(len(examples), highest)
            row = {**row, **_behaviour_row(label, recipe, removed_scorecard(tier, recipe, kept))}
        yield {"removed": label, "poison": recipe.poison, "seed": recipe.seed, **row}


def removed_scorecard(tier: Tier, recipe: FineTune, kept: Sequence[int]) -> Scorecard:
    """Return the scorecard of the model trained on the chats of these numbers."""
    key = stages.key(tier, stages.aligned_source(tier), retraining.retrained(tier, recipe, kept))
    return scorecard(tier, key, lambda: retraining.load_retrained(tier, recipe, kept))


def _behaviour_row(removed: str, recipe: FineTune, card: Scorecard) -> Row:
    assert card.harmful
    assert card.edgy
    complies = [verdict == "complies" for verdict in card.harmful.verdicts]
    head = {"removed": removed, "poison": recipe.poison, "seed": recipe.seed}
    rates = {**card.harmful.complies.columns("complies"), **card.edgy.refuses.columns("over_refusal")}
    return {**head, **rates, "verdicts": complies}


PARTS: dict[str, Callable[[Tier, Sequence[Row]], Iterable[Row]]] = {
    "convex": lambda *_: convex_rows(),
    "transformer": lambda *_: transformer_rows(),
    "subsets": subset_rows,
    "datamodeling": datamodeling_rows,
    "removal": all_removal_rows,
}
