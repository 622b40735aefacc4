r"""Q-realign: quantise a fine-tuned model so that harmful prompts look harmful to it again (arXiv 2601.08089).

Block by block, the clipping γ and the transformation s of :mod:`curvlib.defenses.quantiser` are trained on

.. math:: \frac{\|\hat B(\hat x) - B(x)\|^2}{\|B(x)\|^2} \ \text{(benign)} \quad + \quad
    \mu\,\mathrm{softplus}\bigl(-(w^\top \hat h_\text{last} + b)\bigr) \ \text{(malicious)},

where B is the full-precision block, hats are quantised, :math:`\hat h_\text{last}` is the block's output at the last
prompt token and (w, b) a frozen sparse logistic probe on that state. Losses, probe, learning rates (clipping 1e-2,
transformation 1e-3) and the calibration set (at most 200 samples, 75 % malicious) are the paper's as gathered for this
course. Our readings: the probe tells malicious from benign prompts in the *aligned* model, and its malicious side is
the safe one, for there that model refuses; the reconstruction is relative; weights start from their NF4 values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import softplus

from curvlib.batches import Batch, at_least_float32, taken_apart
from curvlib.defenses.layers import instead, patch
from curvlib.defenses.method import Defended, Method, Setting
from curvlib.defenses.quantiser import QuantisedLinear
from curvlib.evaluate.behaviour import reference_model
from curvlib.generate import left_pad
from curvlib.landscape.directions import adapted_layers, effective_weight
from curvlib.prefix import token_positions
from curvlib.progress import bar

CALIBRATION, MALICIOUS = 200, 0.75
CLIP_RATE, SCALE_RATE = 1e-2, 1e-3
EPOCHS = 8  # each one step on all samples
SPARSITY = 0.02  # L1 penalty of the probe, on standardised states


@dataclass(frozen=True)
class Probe:
    """A linear classifier of states (n, d); positive on the malicious side."""

    weight: Tensor
    bias: Tensor

    def score(self, states: Tensor) -> Tensor:
        """Return :math:`w^T h + b` of each state, (n,)."""
        return states.to(self.weight) @ self.weight + self.bias


def sparse_probe(states: Tensor, malicious: Tensor, *, penalty: float = SPARSITY, steps: int = 300) -> Probe:
    """Fit an L1-penalised logistic regression to states (n, d) and labels (n,) of 0 and 1.

    By proximal gradient steps on standardised states, with the step from the bound ‖X‖²/4n of the curvature.
    """
    mean, spread = states.mean(0), states.std(0).clamp(min=1e-6)
    x, y = torch.nn.functional.pad((states - mean) / spread, (0, 1), value=1.0), malicious.to(states)
    step = 4 * len(x) / float(torch.linalg.matrix_norm(x, 2)) ** 2
    w = x.new_zeros(x.shape[1])
    for _ in range(steps):
        w = w - step * (x.T @ ((x @ w).sigmoid() - y)) / len(x)
        w[:-1] = w[:-1].sign() * (w[:-1].abs() - step * penalty).clamp(min=0)
    return Probe(w[:-1] / spread, w[-1] - (w[:-1] / spread) @ mean)


def realignment_loss(states: Tensor, probe: Probe) -> Tensor:
    """Return the mean of softplus(-(w·h + b)) over malicious last-token states (n, d): small on the malicious side."""
    return softplus(-probe.score(states)).mean()


def reconstruction_loss(found: Tensor, exact: Tensor, mask: Tensor) -> Tensor:
    """Return ‖found - exact‖² / ‖exact‖² over the tokens (B, T) that are no padding."""
    kept = mask.bool()
    found, exact = at_least_float32(found), at_least_float32(exact)
    return (found - exact)[kept].square().sum() / exact[kept].square().sum()


@dataclass(frozen=True)
class Prompts:
    """Calibration prompts, left-padded; rows from ``benign`` on are malicious."""

    ids: Tensor
    mask: Tensor
    benign: int


def calibration(benign: Sequence[Batch], malicious: Sequence[Batch], device: torch.device) -> Prompts:
    """Return at most 200 prompts without their answers, three in four malicious as far as there are enough."""
    rows = [[list(e.input_ids[: e.prompt_length]) for e in taken_apart(part)] for part in (benign, malicious)]
    harmful = min(len(rows[1]), round(MALICIOUS * CALIBRATION))
    harmless = min(len(rows[0]), max(1, round(harmful * (1 - MALICIOUS) / MALICIOUS)))
    ids, mask = left_pad(rows[0][:harmless] + rows[1][:harmful], 0, device)
    return Prompts(ids, mask, harmless)


@dataclass(frozen=True)
class Trace:
    """What went through the blocks: the first one's input, and keyword arguments and output (B, T, d) of each."""

    first: Tensor
    keywords: tuple[dict[str, Any], ...]
    outputs: tuple[Tensor, ...]


@torch.no_grad()
def trace(model: nn.Module, blocks: Sequence[nn.Module], prompts: Prompts) -> Trace:
    """Run the model over the prompts once and keep what its blocks saw."""
    first, keywords, outputs = list[Tensor](), list[dict[str, Any]](), list[Tensor]()

    def record(_: Any, inputs: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        first.extend(inputs[:1] if inputs else [given["hidden_states"]])
        keywords.append({name: value for name, value in given.items() if name != "hidden_states"})
        outputs.append(_states(output))

    handles = [block.register_forward_hook(record, with_kwargs=True) for block in blocks]
    try:
        positions = token_positions(prompts.mask)
        given = {"attention_mask": prompts.mask, "position_ids": positions, "use_cache": False, "logits_to_keep": 1}
        model(input_ids=prompts.ids, **given)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(first[0], tuple(keywords), tuple(outputs))


def quantise(model: PeftModel, bits: int, input_bits: int | None = None) -> dict[str, QuantisedLinear]:
    """Put a fake-quantised twin of its effective weight around each adapted layer, and return the twins by name."""
    twins = {
        name: QuantisedLinear(effective_weight(layer), layer.base_layer.bias, bits, input_bits)
        for name, layer in adapted_layers(model).items()
    }
    patch(model, {name: instead(twin) for name, twin in twins.items()})
    return twins


def train_block(
    block: nn.Module,
    twins: Sequence[QuantisedLinear],
    given: tuple[Tensor, dict[str, Any]],
    exact: Tensor,
    prompts: Prompts,
    probe: Probe,
    weight: float,
    pace: float,
    epochs: int,
) -> Tensor:
    """Train the quantisers of one block, freeze them, and return its output (B, T, d) on ``given``."""
    groups = [
        {"params": [twin.clip for twin in twins], "lr": pace * CLIP_RATE},
        {"params": [twin.scale for twin in twins], "lr": pace * SCALE_RATE},
    ]
    optimiser, n = torch.optim.AdamW(groups, weight_decay=0.0), prompts.benign
    for _ in range(epochs):
        found = _states(block(given[0], **given[1]))
        loss = reconstruction_loss(found[:n], exact[:n], prompts.mask[:n])
        (loss + weight * realignment_loss(found[n:, -1], probe)).backward()
        optimiser.step()
        optimiser.zero_grad()
    for twin in twins:
        twin.freeze()
    with torch.no_grad():
        return _states(block(given[0], **given[1]))


def qrealign(setting: Setting, bits: int, input_bits: int | None, weight: float, pace: float = 1.0) -> Defended:
    """Quantise block by block; cost: eight gradients of the calibration prompts in all, as each block is passed once.

    Args:
        setting: of the comparison.
        bits: of the weights.
        input_bits: of the activations; None leaves them alone.
        weight: μ of the malicious loss.
        pace: multiplies both learning rates, as there are few steps.
    """
    model, chats, epochs = setting.tuned(), setting.chats, setting.steps(EPOCHS)
    core: Any = model.get_base_model()
    blocks, prompts = list(core.model.layers), calibration(chats.benign, chats.safety.refusals, model.device)
    with reference_model(model, "adapter off") as base:
        aligned = trace(base, blocks, prompts)
    exact = trace(model, blocks, prompts)
    labels = torch.arange(len(prompts.ids), device=model.device) >= prompts.benign
    twins, states = quantise(model, bits, input_bits), exact.first
    for number, block in enumerate(bar(blocks, desc="quantise")):
        probe = sparse_probe(aligned.outputs[number][:, -1].float(), labels)
        own = [twin for name, twin in twins.items() if f".layers.{number}." in f".{name}"]
        given = (states, exact.keywords[number])
        states = train_block(block, own, given, exact.outputs[number], prompts, probe, weight, pace, epochs)
    return Defended(model, epochs * len(labels))


def _states(output: Any) -> Tensor:
    """Return the hidden states of a block's output, which older models put first in a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _method(name: str, fixed: Mapping[str, Any]) -> Method:
    searched: tuple[dict[str, float], ...] = ({"weight": 1.0}, {"weight": 10.0}, {"weight": 1.0, "pace": 10.0})
    return Method(name, "quantisation", "2601.08089", qrealign, tuple({**fixed, **trial} for trial in searched))


W8A8 = _method("Q-realign W8A8", {"bits": 8, "input_bits": 8})
W4 = _method("Q-realign W4", {"bits": 4, "input_bits": None})
