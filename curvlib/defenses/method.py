"""The interface that every defence stands behind: what it is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from curvlib import models, stages
from curvlib.batches import Batch, Example
from curvlib.errors import CurvlibError
from curvlib.finetune import TrainingConfig, train
from curvlib.landscape.directions import Direction, weight_difference
from curvlib.restore.recipe import Chats, restoration_chats
from curvlib.stages import FineTune
from curvlib.tiers import Tier

Stage = Literal["reference", "during", "after", "quantisation"]
TRIALS = 3  # settings that each method is searched over


@dataclass(frozen=True)
class Setting:
    """What every method is given: the same aligned model, the same fine-tuning set, the same safety data.

    Attributes:
        tier: sizes, those of the contest among them, and device.
        recipe: how the aligned model is, or would be, fine-tuned.
        tokenizer: of the model.
        chats: the safety budget (refusals, compliances, benign and task chats) and the chats held out from it.
    """

    tier: Tier
    recipe: FineTune
    tokenizer: PreTrainedTokenizerBase
    chats: Chats

    @classmethod
    def of(cls, tier: Tier, recipe: FineTune) -> Setting:
        """Return the setting of a tier and a LoRA fine-tune.

        Raises:
            CurvlibError: the fine-tune moves all weights; the methods are compared on adapters.
        """
        if recipe.method != "lora":
            raise CurvlibError(f"{recipe}: the defences are compared on LoRA fine-tunes, expected method='lora'")
        sizes: dict[str, Any] = dict(tier.contest)
        tier = replace(tier, **sizes)
        tokenizer = models.load_tokenizer(stages.aligned_source(tier))
        return cls(tier, recipe, tokenizer, restoration_chats(tier, tokenizer))

    @property
    def training(self) -> TrainingConfig:
        """The training run of the fine-tune."""
        return stages.tune_training(self.tier, self.recipe)

    @property
    def safety_batches(self) -> list[Batch]:
        """All chats of the safety budget that say how to behave: refusals, task and benign chats."""
        return [*self.chats.safety.refusals, *self.chats.task, *self.chats.benign]

    def start(self) -> PeftModel:
        """Return the aligned model under a fresh adapter, as the fine-tune begins."""
        return models.add_lora(deepcopy(self._aligned), rank=self.recipe.rank, seed=self.recipe.seed)

    def tuned(self) -> PeftModel:
        """Return the model as an undefended fine-tune leaves it; a cached stage."""
        return deepcopy(self._tuned)

    @cached_property
    def _aligned(self) -> PreTrainedModel:
        """Loaded once: a copy takes a tenth of the time."""
        return stages.load_aligned(self.tier)[0]

    @cached_property
    def _tuned(self) -> PeftModel:
        model = stages.load_fine_tuned(self.tier, self.recipe)
        assert isinstance(model, PeftModel)
        return model

    def examples(self) -> list[Example]:
        """Return the chats of the fine-tuning set, poison among them."""
        return stages.fine_tuning_set(self.tokenizer, self.tier, self.recipe)

    def train(
        self, model: PeftModel, examples: Sequence[Example], *, config: TrainingConfig | None = None, **hooks: Any
    ) -> int:
        """Fine-tune ``model`` in place, by default as the undefended fine-tune; return the chats differentiated.

        ``hooks`` are those of :func:`curvlib.finetune.train`.
        """
        config = config or self.training
        train(model, examples, config, pad_id=stages.pad_id(self.tokenizer), label="defended fine-tune", **hooks)
        return config.steps * config.batch_size

    def steps(self, wanted: int) -> int:
        """Return how many optimiser steps a method may take on its own, where it would take ``wanted``."""
        return min(wanted, self.tier.most_steps)

    def longer(self, factor: float) -> TrainingConfig:
        """Return the training run with ``factor`` times as many steps."""
        return replace(self.training, steps=round(factor * self.training.steps))

    def alignment(self) -> Direction:
        r"""Return :math:`V = W_\text{aligned} - W_\text{shipped}` of each linear layer, dense.

        Raises:
            CurvlibError: the model was aligned by its makers, so the weights before are not known.
        """
        source = stages.aligned_source(self.tier)
        if source == self.tier.model:
            raise CurvlibError(f"{source} was aligned by its makers: this method needs a model that was aligned here")
        return weight_difference(
            *(models.load_model(place, quantize=False, device=self.tier.device) for place in (self.tier.model, source))
        )


@dataclass(frozen=True)
class Defended:
    """A defended model, and the number of times that a chat was differentiated to make it.

    With its adapter switched off it is the aligned model, whatever the method did: the judge's reference stays.
    """

    model: PeftModel
    gradients: int = 0


@dataclass(frozen=True)
class Method:
    """One defence.

    Attributes:
        name: as tables show it.
        stage: where it acts; what acts ``during`` a fine-tune has paid for that fine-tune too.
        source: arXiv id, or where else it comes from.
        apply: ``apply(setting, **trial)`` makes the defended model.
        trials: settings of its hyper-parameters that are searched, the paper's or the usual one first.
    """

    name: str
    stage: Stage
    source: str
    apply: Callable[..., Defended]
    trials: tuple[Mapping[str, Any], ...] = ({},)
