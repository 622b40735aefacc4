"""Recipe and study on a tiny model: stages are made once, rows hold their controls, and claims follow from the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from curvlib import models, stages
from curvlib.batches import Example
from curvlib.errors import CurvlibError
from curvlib.evaluate.behaviour import summarise
from curvlib.evaluate.likelihood import token_losses
from curvlib.evaluate.scorecard import Scorecard
from curvlib.evaluate.stats import rate
from curvlib.evaluate.utility import Choices
from curvlib.influence import recipe, retraining, study
from curvlib.influence.claims import claims
from curvlib.influence.recipe import Method
from curvlib.parameters import trainable
from curvlib.stages import FineTune
from curvlib.tiers import Tier, get_tier
from tests import cases
from tests.landscape.tiny import aligned

TIER = replace(get_tier("ci"), tune_examples=12, tune_steps=4, influence_curvature=6, influence_subsets=4)
TUNED = FineTune(poison=0.25, rank=2)
BOTH = ("dot product", "cosine")


def chats(count: int, seed: int) -> list[Example]:
    tokens = torch.randint(1, cases.VOCABULARY, (count, 7), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Example(tuple(row), (*[-100] * 4, *row[4:])) for row in tokens]


def card(complies: int) -> Scorecard:
    verdicts: Any = ["complies"] * complies + ["refuses"] * (4 - complies)
    task = Choices(rate([True, False]), ("A", "B"), (True, False))
    return Scorecard(summarise(verdicts, ["x"] * 4), summarise(["refuses", "complies"], ["x"] * 2), task, 0.0)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tier:
    """Stages and chats are tiny ones, in a cache of their own."""
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(stages, "load_aligned", lambda _: (aligned(), None))
    monkeypatch.setattr(stages, "load_fine_tuned", lambda *_: cases.nf4_llama())
    monkeypatch.setattr(stages, "aligned_source", lambda _: "aligned/model")
    monkeypatch.setattr(models, "identity", str)
    monkeypatch.setattr(stages, "fine_tuned", lambda _, how: Path(f"tuned-{how.poison}-{how.seed}/model"))
    monkeypatch.setattr(stages, "fine_tuning_set", lambda *_: chats(12, 0))
    monkeypatch.setattr(stages, "pad_id", lambda _: 0)
    monkeypatch.setattr(models, "load_tokenizer", lambda _: None)
    asked = {"compliance": chats(2, 1), "refusal": chats(2, 2), "task": chats(2, 3)}
    monkeypatch.setattr(recipe, "queries", lambda _: asked)
    monkeypatch.setattr(recipe, "prompt_excerpts", lambda _, examples: ["some words"] * len(examples))
    monkeypatch.setattr(study, "stage_scorecard", lambda _, how: card(3 if how.poison else 1))
    monkeypatch.setattr(study, "scorecard", lambda *_: card(1))
    return TIER


def test_other_queries_are_scored_with_the_main_inverse(tiny: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, found = recipe.queries(tiny), recipe.scores(tiny, TUNED)["fisher"]
    assert set(found.others) == {"refusal", "task"}
    for kind, values in found.others.items():
        monkeypatch.setattr(recipe, "queries", lambda _, kind=kind: {"compliance": asked[kind]})
        alone = recipe.scores(tiny, TUNED)["fisher"]
        assert cases.relative_error(values, alone.values.mean(dim=0)) < 1e-4
        assert not alone.others


def test_scores_are_made_once_and_leave_no_gradients(tiny: Tier, tmp_path: Path, monkeypatch: Any) -> None:
    methods = [*recipe.MAIN, Method("ekfac", 1.0), Method("cg")]
    found = recipe.scores(tiny, TUNED, methods)
    assert list(found) == ["fisher", *recipe.BASELINES, "ekfac, damping × 10", "cg"]
    assert {name: tuple(scores.values.shape) for name, scores in found.items()} == {
        name: (1, 12) if name == "cg" else (2, 12) for name in found
    }
    assert found["cg"].costs["products"] > 0 == found["fisher"].costs["products"]
    assert found["ekfac, damping × 10"].costs["damping"] == pytest.approx(10 * found["fisher"].costs["damping"])
    assert torch.equal(found["fisher"].suspicion, -found["fisher"].values.mean(0))
    assert not list(tmp_path.rglob("gradients*"))
    monkeypatch.setattr(stages, "load_fine_tuned", None)
    assert torch.equal(recipe.scores(tiny, TUNED, methods)["cg"].values, found["cg"].values)


def test_half_way_scores_are_those_of_the_adapter_at_half_its_strength(tiny: Tier, monkeypatch: Any) -> None:
    found = recipe.all_scores(tiny, TUNED)
    assert list(found) == ["fisher", *recipe.BASELINES, *(f"{name}, half way" for name in ("fisher", *BOTH))]

    def halved(*_: Any) -> Any:
        model = cases.nf4_llama()
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                parameter.data.mul_(0.5)
        return model

    monkeypatch.setattr(stages, "load_fine_tuned", halved)
    monkeypatch.setattr(stages, "fine_tuned", lambda *_: Path("halved/model"))
    at_the_end = recipe.scores(tiny, TUNED)
    for name in ("fisher", *BOTH):
        assert torch.equal(found[f"{name}, half way"].values, at_the_end[name].values)
        assert not torch.allclose(found[name].values, at_the_end[name].values)


def test_a_retrained_model_saw_its_part_alone_and_is_kept(tiny: Tier, monkeypatch: Any) -> None:
    seen: list[Any] = []
    train = retraining.train
    monkeypatch.setattr(
        retraining, "train", lambda m, part, how, **rest: (seen.append((part, how)), train(m, part, how, **rest))
    )
    kept = retraining.without(12, [0, 3, 5])
    model = retraining.load_retrained(tiny, TUNED, kept)
    ((part, how),) = seen
    assert part == [chats(12, 0)[number] for number in kept]
    assert how.steps == 3  # 4 steps for 12 chats
    losses = retraining.query_losses(tiny, TUNED, kept)
    measured = token_losses(model, recipe.queries(tiny)["compliance"])
    assert losses == pytest.approx([float(loss.mean()) for loss in measured], rel=1e-5)
    assert any(p.requires_grad for p in model.parameters())
    monkeypatch.setattr(retraining, "train", None)
    assert retraining.query_losses(tiny, TUNED, kept) == losses


def test_the_last_chats_are_the_poison(tiny: Tier) -> None:
    assert recipe.training_set(tiny, TUNED)[1] == [False] * 9 + [True] * 3


def test_the_study_runs_and_claims_what_its_rows_say(tiny: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SEEDS", (0, 1))
    monkeypatch.setattr(study, "transformer_rows", lambda: transformer_rows(0.95))
    rows: list[dict[str, Any]] = []
    for part, measure in study.PARTS.items():
        rows += [{"part": part, **row} for row in measure(tiny, tuple(rows))]
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(study.PARTS)
    assert [claim.id for claim in claims(rows[:3])] == ["loo_spearman_convex"]
    by = {claim.id: claim for claim in claims(rows)}
    assert list(by) == [
        "loo_spearman_convex",
        "loo_spearman_transformer",
        "lds",
        "lds_best_baseline",
        "lds_gain",
        "lds_mean_gain",
        "lds_half_way_gain",
        "poison_auroc",
        "removal_compliance_gap_points",
        "poison_auroc_half_way",
        "removal_compliance_gap_points_half_way",
    ]
    assert by["loo_spearman_convex"].holds
    assert by["removal_compliance_gap_points"].value == 0  # the stand-ins comply as often as the clean one
    scored = [row for row in rows if row["part"] == "datamodeling"]
    assert all(-1.001 <= row["lds_low"] <= row["lds_high"] <= 1.001 and abs(row["lds_value"]) < 1.001 for row in scored)
    assert {"random", "embedding", "cg", "fisher"} <= {row["label"] for row in scored}
    assert {row["mean_gain_value"] for row in scored if row["label"] == "dot product"} == {0.0}
    assert {row["label"] for row in scored if "gain_value" not in row} == {"cg", "lbfgs", "neumann"}
    benign = [row for row in rows if row["part"] == "removal" and row["poison"] == 0]
    assert "clean fine-tune" not in {row["removed"] for row in benign}
    assert all("auroc_value" not in row for row in benign)
    assert [row["highest"] for row in benign if row["removed"] != "nothing"] == [["some words"]] * 2  # a tenth of 12


def test_long_parts_go_on_from_the_rows_that_are_there(tiny: Tier) -> None:
    subsets = [{"part": "subsets", **row} for row in study.subset_rows(tiny)]
    assert list(study.subset_rows(tiny, subsets[:-1])) == [{key: subsets[-1][key] for key in ("subset", "losses")}]
    with pytest.raises(CurvlibError, match=r"0 of \d+ retrainings were made: measure the part 'subsets' first"):
        study.datamodeling_rows(tiny, [])
    removal = [{"part": "removal", **row} for row in study.all_removal_rows(tiny)]
    left = list(study.all_removal_rows(tiny, removal[:-2]))
    assert [row["removed"] for row in left] == [row["removed"] for row in removal[-2:]]
    assert list(study.all_removal_rows(tiny, removal)) == []


def transformer_rows(best: float) -> list[dict[str, Any]]:
    return [
        {"method": name, "seed": seed, "spearman": value, "n": 4}
        for seed in (0, 1)
        for name, value in (("hessian", best), ("identity", 0.5), ("cosine", 0.99))
    ]


@pytest.mark.parametrize(("best", "holds"), [(0.95, True), (0.85, False)])
def test_the_best_inverse_must_reach_its_rule(best: float, holds: bool) -> None:
    rows = [{"part": "convex", "spearman": 0.9, "control": 0.0}] * 2
    first, second = claims([*rows, *({"part": "transformer", **row} for row in transformer_rows(best))])
    assert (first.holds, second.holds, second.value, second.control) == (False, holds, pytest.approx(best), 0.5)
