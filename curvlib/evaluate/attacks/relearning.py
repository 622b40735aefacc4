"""Relearning: a few training steps on poisoned chats, and what the curve of the log-odds of refusing says.

The rate is constant, so that the read-outs of one run are points of one curve. A curve tells of this attacker only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from curvlib.batches import Example, answer_loss
from curvlib.errors import CurvlibError
from curvlib.finetune import TrainingConfig, batch_stream
from curvlib.nf4 import kept_weights
from curvlib.parameters import trainable


@dataclass(frozen=True)
class Relearning:
    """One attack: the steps at which it was read out, the change of the effective weights, and the log-odds (nats)."""

    steps: tuple[int, ...]
    distances: tuple[float, ...]
    log_odds: NDArray[np.float64]  # (reads, prompts)


def relearn(
    model: nn.Module,
    examples: Sequence[Example],
    log_odds: Callable[[], ArrayLike],
    *,
    pad_id: int,
    reads: Sequence[int] = (0, 1, 2, 4, 8),
    rate: float = 2e-4,
    fixed_length: bool = False,
    batch_size: int = 8,
    seed: int = 0,
) -> Relearning:
    """Train the model's adapter on the attacker's ``examples`` at a constant rate, in place, with read-outs on the way.

    ``log_odds`` reads the model as it is, (prompts,), after each number of steps in ``reads``, which rise from 0.
    AdamW's signs hide the size of a gradient; with ``fixed_length`` a step goes straight along it and is ``rate`` long.
    Cost: ``reads[-1]`` gradients of a batch, and the read-outs. CurvlibError for other ``reads``.
    """
    if list(reads) != sorted({0, *reads}):
        raise CurvlibError(f"read-outs at {tuple(reads)} steps were asked for, expected rising numbers from 0 on")
    parameters = trainable(model)
    kind = torch.optim.SGD if fixed_length else torch.optim.AdamW
    optimiser = kind(parameters.values(), lr=rate, weight_decay=0.0)
    stream = batch_stream(examples, TrainingConfig(reads[-1], batch_size, seed=seed), pad_id)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    seen, distances = [np.asarray(log_odds())], [0.0]
    for step in range(1, reads[-1] + 1):
        with kept_weights(model):
            answer_loss(model, next(stream)).backward()
        if fixed_length:
            optimiser.param_groups[0]["lr"] = rate / float(nn.utils.clip_grad_norm_(parameters.values(), inf))
        optimiser.step()
        optimiser.zero_grad()
        if step in reads:
            seen.append(np.asarray(log_odds()))
            distances.append(moved(model, start))
    return Relearning(tuple(reads), tuple(distances), np.stack(seen))


@torch.no_grad()
def moved(model: nn.Module, start: Mapping[str, Tensor]) -> float:
    r"""Return :math:`\lVert s BA - s B_0 A_0 \rVert_F` over all LoRA layers, since ``start``, name -> parameter.

    With L = [B, -B₀] and R = [A; A₀] its square is the sum of :math:`L^\top L \odot R R^\top`: no dense matrix is made.
    """
    total = 0.0
    for name, layer in model.named_modules():
        for adapter, scale in layer.scaling.items() if isinstance(layer, LoraLayer) else ():
            A, B = (f"{name}.lora_{letter}.{adapter}.weight" for letter in "AB")
            left = torch.cat([model.get_parameter(B), -start[B]], dim=1).double()
            right = torch.cat([model.get_parameter(A), start[A]]).double()
            total += scale**2 * float(((left.T @ left) * (right @ right.T)).sum())
    return float(total**0.5)


def area(places: ArrayLike, values: ArrayLike) -> float:
    """Return the mean height of a curve, by trapezoids; what comes after its last place is censored.

    >>> area([0, 2, 6], [1.0, 0.0, 0.0])
    0.16666666666666666
    """
    x, y = np.asarray(places, dtype=float), np.asarray(values, dtype=float)
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def crossing(places: ArrayLike, values: ArrayLike, level: float = 0.5) -> tuple[float, bool]:
    """Return where a curve first falls to ``level``, interpolated, and True; else its last place and False: censored.

    >>> crossing([0, 2, 4], [1.0, 0.75, 0.25]), crossing([0, 2, 4], [1.0, 1.0, 0.9])
    ((3.0, True), (4.0, False))
    """
    x, y = np.asarray(places, dtype=float), np.asarray(values, dtype=float)
    below = np.flatnonzero(y <= level)
    if not len(below):
        return float(x[-1]), False
    near = slice(max(0, below[0] - 1), below[0] + 1)
    return float(np.interp(-level, -y[near], x[near])), True
