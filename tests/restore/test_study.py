"""The restoration study: cases are told apart, controls are what they say, choices and claims follow from the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from curvlib import stages
from curvlib.batches import answer_logits, taken_apart
from curvlib.curvature.lowrank import sampled_fisher
from curvlib.errors import CurvlibError
from curvlib.evaluate.behaviour import reference_model
from curvlib.parameters import flatten, trainable
from curvlib.restore import SafetyBatches, recipe, study
from curvlib.restore import cases as models_of_study
from curvlib.restore import rows as rows_of_study
from curvlib.restore.cases import NOTHING, POISONED, REVERSION, Case, cost, key, load
from curvlib.restore.objectives import mean_loss
from curvlib.restore.outcome import Budget, HeldOut
from curvlib.restore.recipe import Chats, Restoration
from curvlib.restore.study import OURS, REALIGN, label
from curvlib.stages import FineTune
from curvlib.tiers import Tier
from tests import cases
from tests.landscape.tiny import tiny  # noqa: F401  a fixture

ROW: dict[str, Any] = {"seed": 0, "harmful": ["refuses"], "edgy": ["complies"], "task": [True]}
QUICK = Restoration(metric="identity", budget=Budget(steps=1, rise=10.0))


@pytest.fixture
def small(tiny: Tier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tier:  # noqa: F811
    def fine_tuned(tier: Tier, how: FineTune) -> Path:
        folder = tmp_path / f"tuned-{how.method}-{how.rank}-{how.poison}-{how.seed}" / "model"
        if how.method == "lora" and not folder.exists():
            model: Any = stages.load_fine_tuned(tier, how)
            model.save_pretrained(str(folder))
        return folder

    task, refusals, benign = (cases.batches(2, seed=seed) for seed in (1, 2, 3))
    safety = SafetyBatches(refusals)
    given = Chats(task, safety, benign, HeldOut(safety, {"task": task, "benign": benign}))
    monkeypatch.setattr(models_of_study, "_given", lambda *_: given)
    monkeypatch.setattr(stages, "fine_tuned", fine_tuned)
    monkeypatch.setattr(stages, "pad_id", lambda _: 0)
    monkeypatch.setattr(stages, "fine_tuning_set", lambda *_: taken_apart(task))
    monkeypatch.setattr(recipe, "pad_id", lambda _: 0)
    return tiny


def test_every_case_has_a_key_of_its_own(small: Tier) -> None:
    quick = Case("quick", QUICK)
    found = [NOTHING, REVERSION, quick, replace(quick, control="random step"), replace(quick, control="shuffled")]
    keys = [str(key(small, case)) for case in [*found, quick.at(POISONED, 1)]]
    assert len(set(keys)) == len(keys)


def test_a_random_step_is_as_dear_as_the_restoration_and_points_elsewhere(small: Tier) -> None:
    quick = Case("quick", QUICK)
    start, done, moved = (
        flatten(trainable(load(small, case))).detach()
        for case in (NOTHING, quick, replace(quick, control="random step"))
    )
    model: Any = stages.load_fine_tuned(small, POISONED)
    given = models_of_study.given_chats(small, quick)
    fisher = sampled_fisher(model, [*given.task, *given.benign], samples=models_of_study.DRAWS, seed=0)
    metric = fisher.damped(fisher.scale)
    steps = done - start, moved - start
    paid = [float(step @ metric.matvec(step)) for step in steps]
    assert paid[0] == pytest.approx(paid[1], rel=1e-4)
    assert torch.cosine_similarity(*steps, dim=0).abs() < 0.1


def test_a_full_fine_tune_is_restored_through_a_fresh_adapter_towards_the_aligned_model(small: Tier) -> None:
    full = Case("full", QUICK, fine_tune=replace(POISONED, method="full"))
    restored: Any = load(small, full)
    with reference_model(restored, "adapter off") as below:
        batch = models_of_study.given_chats(small, full).task[0]
        tuned = answer_logits(stages.load_fine_tuned(small, full.fine_tune), batch)
        assert torch.allclose(answer_logits(below, batch), tuned, atol=1e-5)
    assert cost(small, full)["norm"] > 0
    given = models_of_study.given_chats(small, full)
    goal = recipe.aligned_loss(small, QUICK, given)
    assert goal == pytest.approx(mean_loss(stages.load_aligned(small)[0], given.held_out.safety.refusals))
    with pytest.raises(CurvlibError, match="'return' was given for a full fine-tune, expected one that does not read"):
        recipe.aligned_loss(small, Restoration("return"), given)


def test_the_aligned_model_is_attacked_through_the_same_adapter_too(small: Tier) -> None:
    zeroed: Any = load(small, replace(NOTHING, control="zeroed"))
    batch = models_of_study.given_chats(small, Case("quick", QUICK)).task[0]
    aligned = answer_logits(stages.load_aligned(small)[0], batch)
    assert torch.allclose(answer_logits(zeroed, batch), aligned, atol=1e-5)
    tuned: Any = stages.load_fine_tuned(small, POISONED)
    halves = {name: parameter for name, parameter in tuned.named_parameters() if "lora_A" in name}
    assert halves
    assert all(torch.equal(zeroed.get_parameter(name), half) for name, half in halves.items())
    assert key(small, replace(NOTHING, control="zeroed")) != key(small, NOTHING)


def test_a_restored_model_is_fine_tuned_again_and_restored_again(small: Tier) -> None:
    quick = Case("quick", QUICK)
    once, worn, twice = (
        flatten(trainable(load(small, replace(quick, control=name)))).detach() for name in ("", "worn", "twice")
    )
    paths = {key(small, replace(quick, control=name))["model"] for name in ("", "worn", "twice")}
    assert len(paths) == 3
    steps = worn - once, twice - worn
    assert all(step.norm() > 0 for step in steps)
    assert cost(small, replace(quick, control="twice"))["norm"] == pytest.approx(float(steps[1].norm()), rel=1e-3)


def test_alone_means_that_only_safety_chats_are_given(small: Tier) -> None:
    given = models_of_study.given_chats(small, Case("alone", QUICK, without=("task", "benign")))
    assert not given.task
    assert not given.benign
    assert not given.held_out.protected
    assert given.safety.refusals
    saved = Case("saved", replace(QUICK, metric="saved"), without=("task", "benign"))
    assert cost(small, saved)["norm"] > 0


def test_only_the_chats_of_one_role_may_be_gone(small: Tier) -> None:
    given = models_of_study.given_chats(small, Case("gone", QUICK, without=("task",)))
    assert not given.task
    assert given.benign
    assert set(given.held_out.protected) == {"benign"}


def test_guarded_factors_see_benign_chats_beside_the_fine_tuning_set(
    small: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {}

    def fitted(_: Any, batches: Any, **options: Any) -> Any:
        seen["chats"] = taken_apart(batches)
        return fit(_, batches, **options)

    def guards(_: Any, __: Any, split: str, count: int) -> list[Any]:
        return taken_apart(cases.batches(count // 8, seed=len(split)))

    fit = recipe.ekfac
    monkeypatch.setattr(recipe, "ekfac", fitted)
    monkeypatch.setattr(stages, "own_answer_examples", guards)
    plain = recipe.saved_factors(small, POISONED)
    tuned = list(seen["chats"])
    guarded = recipe.saved_factors(small, POISONED, "guarded")
    assert plain != guarded
    assert set(tuned) < set(seen["chats"])
    assert cost(small, Case("guarded", replace(QUICK, metric="guarded"), without=("task", "benign")))["norm"] > 0


def test_parts_yield_only_the_cases_that_have_no_row(small: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "row", lambda _, case, *__: dict(ROW, name=case.name))
    first, second, *rest = study.readings()
    known = [{"part": "screening", "name": case.name, "seed": 0} for case in (second, *rest)]
    assert [found["name"] for found in study.screening(small, known)] == [first.name]
    assert next(study.settings(small, known))["name"] == "4 safety chats"
    regimes = [{"part": "regimes", **found} for found in study.regimes(small)]
    assert list(study.regimes(small, regimes)) == []


def test_cost_counts_what_was_spent(small: Tier) -> None:
    assert cost(small, NOTHING)["gradients"] == 0
    spent = cost(small, Case("quick", QUICK))
    assert spent["gradients"] > 0
    assert spent["norm"] > 0
    start, end = (load(small, Case("quick", how, control=name)) for how, name in ((None, "nothing"), (QUICK, "")))
    deltas = [
        [layer.get_delta_weight("default") for layer in model.modules() if hasattr(layer, "get_delta_weight")]
        for model in (start, end)
    ]
    squares = [float((after - before).detach().square().sum()) for before, after in zip(*deltas, strict=True)]
    assert spent["weight_step"] == pytest.approx(sum(squares) ** 0.5, rel=1e-4)
    reverted = sum(float(before.detach().square().sum()) for before in deltas[0]) ** 0.5
    assert cost(small, REVERSION)["weight_step"] == pytest.approx(reverted, rel=1e-4)
    random = cost(small, Case("quick", QUICK, control="random step"))
    assert random == {"seconds": 0.0, "gradients": 0, "stop_reason": ""}, "what the restoration cost is not its price"
    assert set(spent) >= {"seconds", "stop_reason", "task_loss_rise", "benign_loss_rise"}


def test_finalists_are_the_best_on_validation_and_cheaper_among_equals() -> None:
    scores = {"ascent, ggn": (1.0, 9), "both, fisher": (1.5 + 2**-52, 5), "both, ggn": (1.5, 4), label(OURS): (2.0, 1)}
    rows = [{"name": name, "score": value, "gradients": spent} for name, (value, spent) in scores.items()]
    assert [case.name for case in study.finalists(rows)] == ["both, ggn", "both, fisher"]
    assert {case.name for case in study.readings()} >= {*scores, label(REALIGN), "return, ekfac", "distill, lbfgs"}
    judged = {"harmful": ["refuses", "complies"], "edgy": ["refuses", "complies", "complies", "complies"]}
    assert rows_of_study.score({**judged, "task": [True, False]}) == pytest.approx(0.5 - 0.25 + 0.5)
