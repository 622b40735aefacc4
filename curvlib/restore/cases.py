"""The models of the restoration study: restored ones and their controls, each with a key."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import load_file

from curvlib import models, stages
from curvlib.artifacts import artifact
from curvlib.batches import Batch
from curvlib.curvature.lowrank import sampled_fisher
from curvlib.evaluate.generate import Model
from curvlib.finetune import train
from curvlib.landscape.directions import Direction, multiply_adapter
from curvlib.parameters import assign, flatten, trainable
from curvlib.restore.controls import random_step, shuffled_answers
from curvlib.restore.metrics import DRAWS
from curvlib.restore.outcome import chats
from curvlib.restore.recipe import BATCH_SIZE, Chats, Restoration, adapted, restoration_chats, restored
from curvlib.stages import FineTune
from curvlib.tiers import Tier

Row = dict[str, Any]
POISONED, SEEDS = FineTune(poison=0.1), (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """One model of the study.

    Attributes:
        name: for readers.
        how: the reading; None for a model that is not restored.
        control: what is changed against the reading, see :func:`load`; empty for the reading itself.
        without: roles, of ``task`` and ``benign``, whose chats are not at hand: neither given, nor judged on.
        fine_tune: what is restored.
        sizes: fields of the tier that differ, such as ``("restore_chats", 4)``.
    """

    name: str
    how: Restoration | None = None
    control: str = ""
    fine_tune: FineTune = POISONED
    sizes: tuple[tuple[str, int], ...] = ()
    without: tuple[str, ...] = ()

    def at(self, fine_tune: FineTune, seed: int) -> Case:
        """Return the same case for another fine-tune and seed."""
        return replace(self, fine_tune=replace(fine_tune, seed=seed))


NOTHING, REVERSION = Case("nothing", control="nothing"), Case("full reversion", control="reversion")


def cost(tier: Tier, case: Case) -> Row:
    """Return seconds, gradients (a product counts as two of each chat it meets), the step's norms and how it ended.

    ``norm`` is that of the step in the adapter's numbers, ``weight_step`` that in effective weights, which does not
    depend on how A and B share a scale. A model that nothing restored cost nothing.
    """
    free = {"seconds": 0.0, "gradients": 0, "stop_reason": ""}
    if case.control == "random step":  # of the restoration's length in another sense, see :func:`load`
        return free
    if case.how is None:
        reverted = case.control == "reversion"
        way = saved_direction(stages.fine_tuned(tier, case.fine_tune)).size if reverted else 0.0
        return {**free, "norm": 0.0, "weight_step": way}
    folder = adapter(tier, case)
    found = json.loads((folder / "history.json").read_text("utf-8"))
    given = given_chats(tier, case)
    gradients = found["gradients"] + 2 * found["products"] * chats(_multiplied(case.how, given))
    paid = {role: loss - found["steps"][0]["protected"][role] for role, loss in found["steps"][-1]["protected"].items()}
    told = {"seconds": found["seconds"], "norm": found["change"], "stop_reason": found["stop_reason"]}
    if case.fine_tune.method == "lora":
        start = worn(tier, case) if case.control == "twice" else stages.fine_tuned(tier, case.fine_tune)
        told["weight_step"] = (saved_direction(folder / "model") - saved_direction(start)).size
    return {"gradients": gradients, **told, **{f"{role}_loss_rise": rise for role, rise in paid.items()}}


def _multiplied(how: Restoration, given: Chats) -> list[Batch]:
    """Return the chats whose curvature a product of the reading takes."""
    protected, safety = [*given.task, *given.benign], given.safety
    if how.objective == "return":
        return [*protected, *safety.refusals]
    return [*protected, *safety.compliances] if how.metric == "composite" else protected


def saved_direction(folder: Path) -> Direction:
    r"""Return a saved LoRA adapter's :math:`\Delta W = s\,BA` of each layer, without loading the model."""
    config = PeftConfig.from_pretrained(str(folder))
    saved = load_file(folder / "adapter_model.safetensors")
    halves = {name: name.replace("lora_A", "lora_B") for name in saved if "lora_A" in name}
    scaling = config.lora_alpha / config.r
    return Direction({down: (scaling * saved[up], saved[down]) for down, up in halves.items()})


def given_chats(tier: Tier, case: Case) -> Chats:
    """Return what a case's restoration sees; ``shuffled`` deals the answers of refusals and benign chats out anew.

    ``task alone`` leaves the benign chats out of the metric; the held-out ones still judge.
    """
    tokenizer, given = models.load_tokenizer(stages.aligned_source(tier)), _given(tier, case.sizes)
    if case.without:
        protected = {role: chats for role, chats in given.held_out.protected.items() if role not in case.without}
        none: dict[str, Any] = {role: [] for role in case.without}
        given = replace(given, **none, held_out=replace(given.held_out, protected=protected))
    if case.control == "task alone":
        return replace(given, benign=[])
    if case.control != "shuffled":
        return given
    pad = stages.pad_id(tokenizer)
    dealt = shuffled_answers(
        given.safety.refusals, given.benign, seed=case.fine_tune.seed, pad_id=pad, batch_size=BATCH_SIZE
    )
    return replace(given, safety=replace(given.safety, refusals=dealt[0]), benign=dealt[1])


@cache
def _given(tier: Tier, sizes: tuple[tuple[str, int], ...]) -> Chats:
    """Return the tier's chats with other sizes; encoding them takes seconds, and a row of the study asks many times."""
    changed: dict[str, Any] = dict(sizes)
    return restoration_chats(replace(tier, **changed), models.load_tokenizer(stages.aligned_source(tier)))


def adapter(tier: Tier, case: Case) -> Path:
    """Return the folder of a case's restored adapter; of ``twice`` that of the second restoration."""
    assert case.how
    again = worn(tier, case) if case.control == "twice" else None
    return restored(tier, case.fine_tune, case.how, given_chats(tier, case), again)


def worn(tier: Tier, case: Case) -> Path:
    """Return the adapter of a case's restored model after the same fine-tune once more, made once."""
    first = adapter(tier, replace(case, control=""))
    tokenizer = models.load_tokenizer(stages.aligned_source(tier))
    examples = stages.fine_tuning_set(tokenizer, tier, case.fine_tune)
    training = stages.tune_training(tier, case.fine_tune)

    def build(place: Path) -> None:
        model, checkpoint = adapted(tier, case.fine_tune, first / "model"), place / "training.safetensors"
        train(
            model, examples, training, pad_id=stages.pad_id(tokenizer), checkpoint=checkpoint, label="fine-tune again"
        )
        model.save_pretrained(str(place / "model"))

    config = {"restored": first.name, "training": asdict(training), "texts": stages.digest(examples)}
    return artifact("fine-tune-again", config, build) / "model"


def key(tier: Tier, case: Case) -> dict[str, Any]:
    """Return what tells a case's model from every other one, as other lessons do."""
    if case.control == "nothing":
        return {"model": stages.fine_tuned(tier, case.fine_tune).parent.name}
    if case.control == "reversion":
        return {"model": Path(stages.aligned_source(tier)).parent.name}
    if case.control == "zeroed":
        return {"zeroed": stages.fine_tuned(tier, case.fine_tune).parent.name}
    if case.control == "worn":
        return {"model": worn(tier, case).parent.name}
    name = adapter(tier, case).name
    return {"random step like": name, "seed": case.fine_tune.seed} if case.control == "random step" else {"model": name}


def load(tier: Tier, case: Case) -> Model:
    """Return a case's model: fine-tuned (``nothing``), aligned (``reversion``), restored, or moved at random instead.

    ``zeroed`` is the aligned model under the fine-tuned adapter with B at zero, from where training moves it through
    the same A as restored models. The ``random step`` has the restoration's norm in the metric of the protected chats.
    ``worn`` is restored and fine-tuned again as before; ``twice`` restores that one too.
    """
    if case.control == "nothing":
        return stages.load_fine_tuned(tier, case.fine_tune)
    if case.control == "reversion":
        return stages.load_aligned(tier)[0]
    if case.control == "zeroed":
        tuned: Any = stages.load_fine_tuned(tier, case.fine_tune)
        multiply_adapter(tuned, lambda _: 0.0)
        return tuned  # type: ignore[no-any-return]  # peft's own type
    folder = worn(tier, case) if case.control == "worn" else adapter(tier, case) / "model"
    done = adapted(tier, case.fine_tune, folder)
    if case.control != "random step":
        return done
    model, given = stages.load_fine_tuned(tier, case.fine_tune), given_chats(tier, case)
    start = flatten(trainable(model))
    fisher = sampled_fisher(model, [*given.task, *given.benign], samples=DRAWS, seed=case.fine_tune.seed)
    step = flatten(trainable(done)) - start
    with torch.no_grad():
        noise = random_step(fisher.damped(fisher.scale), step, seed=case.fine_tune.seed)
        assign(trainable(model), start + noise)
    return model
