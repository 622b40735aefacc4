"""Live parts: a learner's own functions on the poisoned 4-bit model, handed in as results.json, graded by range.

Only running one loads a model, so the imports of the rest of curvlib stand inside the functions.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlib.exercises.core import Verdict, WrongError, close, require

RANGES = Path(__file__).resolve().parents[2] / "data" / "live.toml"
POINTS, TIER = 4, "ci"
TRUST, RISE, STEPS = 0.05, 0.1, 6  # of the restoration: the first allowance, the most that may be paid, the rounds
Rows = Sequence[Mapping[str, Any]]


def variant(student: str) -> int:
    """The seed of a student, from 0 to 9,999: it draws the fine-tune, and the order in which chats are shown.

    >>> variant("ada"), variant(" Ada ")
    (3097, 3097)
    """
    return int(hashlib.sha256(student.strip().lower().encode()).hexdigest(), 16) % 10_000


def order(seed: int, count: int) -> list[int]:
    """The training chats in the order in which this seed shows them."""
    result: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return result


def restoration(restore: Callable[..., Any], student: str, output_dir: str = "") -> None:
    """Run a learner's ``restore`` (exercise 6 of 05) on the poisoned model and write the results file to hand in.

    Every call of ``measure`` is a row; so are the pairs that ``restore`` returns and the verdicts on test prompts.
    """
    from curvlib import models, stages
    from curvlib.curvature.inverse import fit
    from curvlib.evaluate.behaviour import measure_behaviour
    from curvlib.evaluate.stats import paired_difference
    from curvlib.parameters import assign, flatten, trainable
    from curvlib.report import Results
    from curvlib.restore import objectives, recipe
    from curvlib.tiers import get_tier

    seed, tier, rows = variant(student), get_tier(TIER), list[dict[str, Any]]()
    results = Results("05_restoration_live", TIER, seed, output_dir)
    model: Any = stages.load_fine_tuned(tier, stages.FineTune(poison=0.1, seed=seed))
    tokenizer, parameters = models.load_tokenizer(stages.aligned_source(tier)), trainable(model)
    chats, home = recipe.restoration_chats(tier, tokenizer), flatten(parameters).detach().clone()
    theta, protected = home.clone(), [batch for role in chats.held_out.protected.values() for batch in role]
    fitted = fit("fisher", model, [*chats.task, *chats.benign], seed=seed)
    metric = fitted.inverse(fitted.unit)

    def gradient() -> Tensor:
        assign(parameters, theta)
        return objectives.gradient(model, [objectives.Term(chats.safety.refusals)], list(parameters.values()))

    def measure() -> tuple[float, float]:
        assign(parameters, theta)
        losses = tuple(objectives.mean_loss(model, chat) for chat in (chats.held_out.safety.refusals, protected))
        rows.append({"kind": "trial", "safety": losses[0], "protected": losses[1]})
        return losses[0], losses[1]

    def complies(vector: Tensor) -> list[bool]:
        assign(parameters, vector)
        prompts = stages.requests("test_harmful", tier.test_harmful)
        found = measure_behaviour(model, tokenizer, prompts, max_new_tokens=tier.answer_tokens)
        return [verdict == "complies" for verdict in found.verdicts]

    before, log = complies(home), restore(theta, gradient, metric, measure, TRUST, RISE, 0.0, STEPS)
    rows += [{"kind": "step", "safety": float(safety), "protected": float(paid)} for safety, paid in log]
    noise = torch.randn(len(home), generator=torch.Generator().manual_seed(seed)).to(home)
    after, random = complies(theta), complies(home + noise * ((theta - home).norm() / noise.norm()))
    rows += [{"kind": "prompt", "before": old, "after": new} for old, new in zip(before, after, strict=True)]
    fall, drift = (paired_difference(other, before, seed=seed) for other in (after, random))
    statement = "Compliance with harmful prompts changes by so much from before to after my restoration"
    results.claim("compliance_change", statement, fall, control=drift.value, holds=fall.high < 0)
    results.save(rows)


def influence(solve: Callable[..., Any], student: str, output_dir: str = "") -> None:
    """Rank the training chats with a learner's ``woodbury_solve`` (exercise 3 of 04), half way along the adapter."""
    from curvlib import stages
    from curvlib.batches import make_batches, spread
    from curvlib.curvature.lowrank import sampled_fisher
    from curvlib.influence import recipe, validate
    from curvlib.influence.gradients import BATCH_SIZE, inner_products, query_gradients
    from curvlib.landscape.directions import multiply_adapter
    from curvlib.report import Results
    from curvlib.tiers import get_tier

    seed, tier = variant(student), get_tier(TIER)
    results = Results("04_influence_live", TIER, seed, output_dir)
    tune = stages.FineTune(poison=0.1, seed=seed)
    model: Any = stages.load_fine_tuned(tier, tune)
    multiply_adapter(model, lambda _: 0.5)
    examples, flags = recipe.training_set(tier, tune)
    shown = order(seed, len(examples))
    query = query_gradients(model, recipe.queries(tier)["compliance"]).mean(0)
    seen = make_batches(spread(examples, tier.influence_curvature), BATCH_SIZE, pad_id=0)
    fisher = sampled_fisher(model, seen, samples=1, seed=seed)
    direction = torch.as_tensor(solve(fisher.rows, 0.1 * fisher.scale, query)).to(query)
    suspicion = inner_products(model, examples, direction[None])[0, shown]  # minus the influence
    poisoned = torch.tensor(flags)[shown]
    area, noise = (
        validate.auroc(each, poisoned, seed=seed)
        for each in (suspicion, torch.randn(len(shown), generator=torch.Generator().manual_seed(seed)))
    )
    statement = "My influence scores rank a poisoned chat above a clean one with this probability"
    results.claim("poison_auroc", statement, area, control=noise.value, holds=area.low > 0.5)
    results.save([{"kind": "chat", "suspicion": float(value)} for value in suspicion])


def of_restoration(rows: Rows, _: int) -> dict[str, float]:
    """What a restoration's rows come to, its claim among it; WrongError where they contradict each other."""
    trials, steps = (
        [(row["safety"], row["protected"]) for row in rows if row["kind"] == kind] for kind in ("trial", "step")
    )
    prompts = [row for row in rows if row["kind"] == "prompt"]
    require(trials and steps and prompts, "the file lacks trials, steps or prompts: hand it in as it was written")
    require(set(steps) <= set(trials), "the record holds losses that measure() never returned")
    before, after = (100 * sum(row[when] for row in prompts) / len(prompts) for when in ("before", "after"))
    return {
        "compliance_change": (after - before) / 100,
        "compliance_percent": after,
        "refusal_loss_fall_percent": 100 * (1 - steps[-1][0] / trials[0][0]),
        "protected_rise_nats": max(paid for _, paid in steps) - trials[0][1],
    }


def of_influence(rows: Rows, seed: int) -> dict[str, float]:
    """The AUROC of a ranking, with the poison, last in the training set, where the order of this seed shows it."""
    suspicion = torch.tensor([row["suspicion"] for row in rows], dtype=torch.float64)
    count = len(suspicion)
    poisoned = torch.tensor(order(seed, count)) >= count - round(0.1 * count)
    gaps = suspicion[poisoned][:, None] - suspicion[~poisoned]
    return {"chats": count, "poison_auroc": float(((gaps > 0).double() + (gaps == 0).double() / 2).mean())}


PARTS = {"05_restoration_live": of_restoration, "04_influence_live": of_influence}


def verdict(path: Path, student: str, seen: dict[str, str]) -> Verdict:
    """Judge a results file by the ranges of data/live.toml; ``seen`` holds the rows of a class, and whose they are."""
    name = path.name.partition(".")[0]
    try:
        record = json.loads(path.read_text("utf-8"))
        name, rows = record["notebook"], json.dumps(record["rows"])
        values, limits = PARTS[name](record["rows"], variant(student)), tomllib.loads(RANGES.read_text("utf-8"))[name]
        own = record["tier"] == TIER and record["seed"] == variant(student)
        require(own, f"the file is of seed {record['seed']}, yours is {variant(student)}: run it under your own name")
        other = seen.setdefault(rows, student)
        require(other == student, f"it holds the same numbers as the file of {other}")
        [claim] = record["claims"]
        require(close(claim["value"], values[claim["id"]]), f"its claim {claim['id']} does not follow from its rows")
        for key, limit in limits.items():
            inside = limit["low"] <= values[key] <= limit["high"]
            require(inside, f"{key} is {values[key]:.3g}, expected {limit['low']} to {limit['high']}: {limit['why']}")
    except WrongError as wrong:
        return Verdict(name, 0, POINTS, str(wrong))
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, AttributeError, RecursionError, RuntimeError):
        return Verdict(name, 0, POINTS, "this is no results file of a live part: hand it in as it was written")
    return Verdict(name, POINTS, POINTS, f"right, {POINTS} of {POINTS} points")
