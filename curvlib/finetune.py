"""One plain training loop, for LoRA adapters and for full fine-tuning alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from curvlib.batches import Batch, Example, answer_loss, make_batches
from curvlib.errors import CurvlibError
from curvlib.nf4 import kept_weights
from curvlib.parameters import trainable
from curvlib.progress import bar

CHECKPOINT_EVERY = 5  # steps: about 20 s of work on 2 cores, so a killed run loses no more than that


@dataclass(frozen=True)
class TrainingConfig:
    """What a training run depends on besides its model and its examples.

    Attributes:
        steps: number of optimiser steps.
        batch_size: chats per step.
        learning_rate: the peak of the schedule; it rises over the first tenth and falls linearly to a tenth.
        max_gradient_norm: gradients with a larger l2 norm are scaled down to it.
        seed: fixes the order of the examples.
    """

    steps: int
    batch_size: int = 8
    learning_rate: float = 1e-3
    max_gradient_norm: float = 1.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 0.

        >>> [round(TrainingConfig(steps=10, learning_rate=1.0).rate(step), 2) for step in (0, 5, 9)]
        [1.0, 0.55, 0.19]
        """
        warm_up = min(1.0, (step + 1) / max(1, self.steps // 10))
        return self.learning_rate * warm_up * (1 - 0.9 * step / self.steps)


@dataclass(frozen=True)
class TrainingResult:
    """The loss of each step (nats per answer token), the number of gradients and the seconds of this call."""

    losses: tuple[float, ...]
    gradient_evaluations: int
    seconds: float


def batch_stream(examples: Sequence[Example], config: TrainingConfig, pad_id: int) -> Iterator[Batch]:
    """Yield batches without end: each epoch shuffles, sorts blocks of eight batches by length, shuffles the batches.

    Sorting within blocks keeps padding low (chats in a batch are alike in length) and the order random.
    """
    order = random.Random(config.seed)
    block = 8 * config.batch_size
    while True:
        epoch = order.sample(examples, len(examples))
        blocks = [epoch[start : start + block] for start in range(0, len(epoch), block)]
        batches = [batch for part in blocks for batch in make_batches(part, config.batch_size, pad_id)]
        yield from order.sample(batches, len(batches))


def train(
    model: nn.Module,
    examples: Sequence[Example],
    config: TrainingConfig,
    *,
    pad_id: int,
    checkpoint: Path | None = None,
    label: str = "train",
    on_gradient: Callable[[], None] | None = None,
    on_step: Callable[[], None] | None = None,
) -> TrainingResult:
    """Minimise the mean negative log-likelihood of the answers over the model's trainable parameters, by AdamW.

    Args:
        model: any causal language model; only parameters that require a gradient move.
        examples: encoded chats, see :func:`curvlib.batches.encode`.
        config: steps, batch size, learning rate, seed.
        pad_id: the tokenizer's padding token.
        checkpoint: file that holds the state every few steps; a killed run resumes from it and ends at the same
            parameters as one that was not killed. It is removed at the end.
        label: name on the progress bar.
        on_gradient: called when the gradients are in place and not clipped yet; it may change them.
        on_step: called after each step. A run with either cannot be resumed: leave ``checkpoint`` out.

    Raises:
        CurvlibError: the loss is not finite, or the checkpoint belongs to other parameters.

    Cost: ``config.steps`` gradients of ``config.batch_size`` chats each.
    """
    parameters = list(trainable(model).values())
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.0)
    losses = _resume(optimiser, parameters, checkpoint)
    stream = batch_stream(examples, config, pad_id)
    for _ in losses:
        next(stream)
    begin, first, was_training = time.perf_counter(), len(losses), model.training
    model.train()
    with kept_weights(model):
        for step in bar(range(first, config.steps), desc=label, initial=first, total=config.steps):
            for group in optimiser.param_groups:
                group["lr"] = config.rate(step)
            losses.append(_step(model, next(stream), optimiser, config.max_gradient_norm, on_gradient))
            if on_step:
                on_step()
            if checkpoint and (step + 1) % CHECKPOINT_EVERY == 0:
                _save(optimiser, parameters, losses, checkpoint)
    model.train(was_training)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return TrainingResult(tuple(losses), config.steps - first, time.perf_counter() - begin)


def _step(
    model: nn.Module,
    batch: Batch,
    optimiser: torch.optim.Optimizer,
    max_norm: float,
    on_gradient: Callable[[], None] | None = None,
) -> float:
    total = 0.0
    for part in batch.affordable(next(model.parameters()).device):
        loss = part.tokens / batch.tokens * answer_loss(model, part)
        if not torch.isfinite(loss):
            raise CurvlibError(f"the training loss is {loss.item()}: lower the learning rate")
        loss.backward()
        total += loss.item()
    if on_gradient:
        on_gradient()
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, max_norm)
    optimiser.step()
    optimiser.zero_grad()
    return total


def _save(
    optimiser: torch.optim.Optimizer, parameters: list[torch.Tensor], losses: list[float], checkpoint: Path
) -> None:
    """Write parameters, both AdamW moments and the losses so far in one file, atomically."""
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for number, parameter in enumerate(parameters):
        state = optimiser.state[parameter]
        moments = {"value": parameter.detach(), "first": state["exp_avg"], "second": state["exp_avg_sq"]}
        tensors |= {f"{number}.{name}": moment.contiguous() for name, moment in moments.items()}
    temporary = checkpoint.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(checkpoint)


def _resume(optimiser: torch.optim.Optimizer, parameters: list[torch.Tensor], checkpoint: Path | None) -> list[float]:
    """Load what :func:`_save` wrote, if anything; return the losses of the steps already taken."""
    if not checkpoint or not checkpoint.exists():
        return []
    tensors = load_file(checkpoint)
    losses: list[float] = tensors.pop("losses").tolist()
    if len(tensors) != 3 * len(parameters):
        raise CurvlibError(f"{checkpoint} holds other parameters than this model's: remove it and start again")
    for number, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"{number}.value"])
        optimiser.state[parameter] = {
            "step": torch.tensor(float(len(losses))),
            "exp_avg": tensors[f"{number}.first"].to(parameter.device),
            "exp_avg_sq": tensors[f"{number}.second"].to(parameter.device),
        }
    return losses
