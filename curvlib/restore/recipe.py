"""Restoration as a cached stage: which chats it sees at a tier, and where the restored adapter is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from curvlib import curvature, models, stages
from curvlib.artifacts import artifact, code_digest
from curvlib.batches import Batch, Example, make_batches, spread, taken_apart
from curvlib.curvature.inverse import EKFAC_RANK, Fit, Inverse
from curvlib.curvature.kfac import ekfac
from curvlib.curvature.kronecker import EKFAC
from curvlib.errors import CurvlibError
from curvlib.finetune import TrainingConfig
from curvlib.restore.loop import restore
from curvlib.restore.metrics import DRAWS
from curvlib.restore.objectives import GOALS, SafetyBatches, value
from curvlib.restore.outcome import Budget, HeldOut, RestorationResult, held_out_terms
from curvlib.restore.realign import realign
from curvlib.stages import FineTune, pad_id
from curvlib.tiers import Tier

CODE = {  # files that make a restored adapter, beside outcome.py and objectives.py
    "realign": ("realign",),
    "return": ("weighted_return",),
    "": ("loop", "metrics"),
}
FACTOR_CHATS = 64  # a third of a fine-tuning set; each is differentiated twice
SAVED = ("saved", "guarded")  # metrics that were saved beside the adapter
BATCH_SIZE = 8  # chats a forward pass: keeps the activations of a gradient near 1 GB


@dataclass(frozen=True)
class Restoration:
    """One reading of the method: the objective (``realign`` for the baseline), the metric, and the budget.

    ``training`` are the runs that a re-alignment chooses from, if not its own; their seed is the fine-tune's.
    """

    objective: str = "refusal"
    metric: str = "fisher"
    budget: Budget = field(default_factory=Budget)
    training: tuple[TrainingConfig, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Return the fields that tell a restored adapter from others."""
        return {name: value for name, value in asdict(self).items() if value != ()}


@dataclass(frozen=True)
class Chats:
    """Everything that restoration sees, by role; ``held_out`` comes from the validation splits."""

    task: list[Batch]
    safety: SafetyBatches
    benign: list[Batch]
    held_out: HeldOut

    @property
    def batches(self) -> list[Batch]:
        """Every batch, whatever its role."""
        seen = [*self.task, *self.safety.refusals, *self.safety.compliances, *self.benign]
        held_out = [*self.held_out.safety.refusals, *self.held_out.safety.compliances]
        return seen + held_out + [batch for batches in self.held_out.protected.values() for batch in batches]


def restoration_chats(tier: Tier, tokenizer: PreTrainedTokenizerBase) -> Chats:
    """Return the chats of a tier: restore splits for gradients and curvature, validation splits for judging steps."""
    pad = pad_id(tokenizer)

    def batches(examples: list[Example]) -> list[Batch]:
        return make_batches(examples, BATCH_SIZE, pad)

    def safety(split: str, count: int) -> SafetyBatches:
        refusals = stages.refusal_examples(tokenizer, split, count)
        compliances = stages.compliance_examples(tokenizer, split, count, questions=True)
        return SafetyBatches(batches(refusals), batches(compliances))

    def own(split: str, count: int) -> list[Example]:
        return stages.own_answer_examples(tokenizer, tier, split, count)

    half = tier.curvature_chats // 2
    held_out = {
        "task": batches(stages.task_examples(tokenizer, "validation_task", tier.held_out)),
        "benign": batches(own("validation_edgy", tier.held_out // 2) + own("validation_benign", tier.held_out // 2)),
    }
    return Chats(
        task=batches(stages.task_examples(tokenizer, "restore_task", tier.curvature_chats)),
        safety=safety("restore_harmful", tier.restore_chats),
        benign=batches(own("restore_edgy", tier.curvature_chats - half) + own("restore_benign", half)),
        held_out=HeldOut(safety("validation_harmful", tier.held_out), held_out),
    )


def saved_factors(tier: Tier, recipe: FineTune, metric: str = "saved") -> Path:
    """Return the EK-FAC file that is saved beside a fine-tuned adapter, so that later nobody needs its data; made once.

    It is fitted to :data:`FACTOR_CHATS` chats of the fine-tuning set, evenly spaced, whatever poison is among them; if
    ``guarded``, to half as many of these, and to as many benign and benign-edgy chats.
    """
    tuned, tokenizer = stages.fine_tuned(tier, recipe), models.load_tokenizer(stages.aligned_source(tier))
    guards = list[Example]()
    if metric == "guarded":
        for split in ("restore_edgy", "restore_benign"):
            guards += stages.own_answer_examples(tokenizer, tier, split, FACTOR_CHATS // 4)
    seen = spread(stages.fine_tuning_set(tokenizer, tier, recipe), FACTOR_CHATS - len(guards)) + guards
    config = {"fine_tuned": tuned.parent.name, "texts": stages.digest(seen), "rank": EKFAC_RANK}

    def build(place: Path) -> None:
        batches = make_batches(seen, BATCH_SIZE, pad_id(tokenizer))
        found = ekfac(stages.load_fine_tuned(tier, recipe), batches, rank=EKFAC_RANK, seed=recipe.seed)
        found.save(place / "factors.safetensors", half=True)

    return artifact("factors", {**config, "code": _curvature_code()}, build) / "factors.safetensors"


def restored(
    tier: Tier, recipe: FineTune, how: Restoration, chats: Chats | None = None, worn: Path | None = None
) -> Path:
    """Return the folder of the restored adapter (``model``) and its history (``history.json``); made once.

    ``chats`` are those of the tier unless others are given. ``worn`` is an adapter to restore in the place of the
    fine-tuned one. The metrics :data:`SAVED` are those of :func:`saved_factors`.

    Raises:
        CurvlibError: the reading needs the aligned model, and the base under the adapter is a full fine-tune.
    """
    chats = chats or restoration_chats(tier, models.load_tokenizer(stages.aligned_source(tier)))
    start = (worn or stages.fine_tuned(tier, recipe)).parent.name
    config = {"fine_tuned": start, **how.settings(), "seed": recipe.seed}
    config["texts"] = stages.digest(taken_apart(chats.batches))
    names = CODE.get(how.objective, CODE[""])
    own = [Path(__file__).with_name(f"{name}.py") for name in ("outcome", "objectives", *names)]
    config["code"] = [code_digest(own), _curvature_code()]
    factors = saved_factors(tier, recipe, how.metric) if how.metric in SAVED else None
    if factors:
        config["factors"] = factors.parent.name

    def build(place: Path) -> None:
        own = recipe.method != "full" or how.objective in GOALS
        goal = None if own else aligned_loss(tier, how, chats)
        model = adapted(tier, recipe, worn)
        result = run(model, chats, how, seed=recipe.seed, factors=factors, goal=goal)
        model.save_pretrained(str(place / "model"))
        (place / "history.json").write_text(json.dumps(history(result), indent=1), "utf-8")

    return artifact("restore", config, build)


def adapted(tier: Tier, recipe: FineTune, folder: Path | None = None) -> PeftModel:
    """Return a fine-tuned model under the adapter in ``folder``; without one, under its own, or a fresh one if full."""
    full = recipe.method == "full"
    if folder and not full:
        return models.load_adapter(stages.load_aligned(tier)[0], folder)
    tuned: Any = stages.load_fine_tuned(tier, recipe)
    if folder:
        return models.load_adapter(tuned, folder)
    return models.add_lora(tuned, rank=recipe.rank, seed=recipe.seed) if full else tuned


def aligned_loss(tier: Tier, how: Restoration, chats: Chats) -> float:
    """Return the aligned model's held-out safety loss where no adapter can be switched off to get it.

    Raises:
        CurvlibError: the reading needs the aligned model at every step.
    """
    if how.objective in ("distill", "return"):
        raise CurvlibError(
            f"objective {how.objective!r} was given for a full fine-tune, expected one that does not read the aligned "
            "model, which lies under a LoRA adapter only: choose refusal, ascent, both, composite or margin"
        )
    objective = "refusal" if how.objective == "realign" else how.objective
    return value(stages.load_aligned(tier)[0], held_out_terms(objective, chats.held_out))


def _curvature_code() -> str:
    return code_digest(Path(curvature.__file__).parent.rglob("*.py"))


def run(
    model: PeftModel,
    chats: Chats,
    how: Restoration,
    *,
    seed: int,
    factors: Path | None = None,
    goal: float | None = None,
) -> RestorationResult:
    """Restore ``model`` in place with the chats given; ``realign`` fine-tunes it on them instead.

    ``factors`` is the file that a saved metric reads. ``goal`` is the held-out safety loss that suffices, that of
    the model without its adapter by default.
    """
    shared: dict[str, Any] = {"held_out": chats.held_out, "benign_batches": chats.benign}
    shared |= {"budget": how.budget, "seed": seed, "goal": goal}
    if how.objective == "realign":
        runs = [replace(run, seed=seed) for run in how.training]
        return realign(model, chats.task, chats.safety, training=runs, **shared)
    metric: Any = how.metric
    if factors:
        metric = saved_metric(EKFAC.load(factors), DRAWS * FACTOR_CHATS, how.budget.damping)
    return restore(model, chats.task, chats.safety, objective=how.objective, metric=metric, **shared)


def saved_metric(model: EKFAC, rows: int, damping: float) -> Inverse:
    r"""Return the metric of an EK-FAC that was fitted where the restoration starts; no chats are needed.

    λ is ``damping`` traces over ``rows``: the mean non-zero eigenvalue of a sampled Fisher matrix of as many rows.
    """
    return Fit("ekfac", model).inverse(damping * model.damping_scale * model.size / rows)


def history(result: RestorationResult) -> dict[str, Any]:
    """Return the result without its vectors, as JSON values."""
    return {
        "steps": [asdict(step) for step in result.steps],
        "trials": [asdict(trial) for trial in result.trials],
        "products": result.products,
        "gradients": result.gradients,
        "seconds": result.seconds,
        "stop_reason": result.stop_reason,
        "change": float((result.after - result.before).norm()),
    }


def load_history(tier: Tier, recipe: FineTune, how: Restoration) -> dict[str, Any]:
    """Return the history of a restoration, see :func:`history`; the restoration is made if it does not exist yet."""
    found: dict[str, Any] = json.loads((restored(tier, recipe, how) / "history.json").read_text("utf-8"))
    return found


def load_restored(tier: Tier, recipe: FineTune, how: Restoration) -> PeftModel:
    """Return the restored model in NF4 under the restored, trainable adapter."""
    return adapted(tier, recipe, restored(tier, recipe, how) / "model")
