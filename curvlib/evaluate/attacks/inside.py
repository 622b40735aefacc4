r"""Attacks on what a model is: its refusal direction projected out, or its merged weights rounded to four bits again.

With r the unit vector between mean states of harmful and harmless prompts, all that is written to the residual stream
is made :math:`h - r\,r^\top h`, so that the stream has projection 0 on r. Source: Arditi et al. (arXiv 2406.11717).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from curvlib.errors import CurvlibError
from curvlib.generate import Model, Prompt, evaluating, left_pad, render
from curvlib.nf4 import dequantise
from curvlib.prefix import token_positions

WRITERS = ("embed_tokens", "self_attn", "mlp")  # what writes to the residual stream of a Llama-like model


def refusal_directions(
    model: Model, tokenizer: PreTrainedTokenizerBase, harmful: Sequence[Prompt], harmless: Sequence[Prompt]
) -> Tensor:
    """Return for each layer but the last the unit vector from the harmless prompts' mean state to the harmful ones'.

    States are those after a layer, at a prompt's last token; (L - 1, d). Cost: one forward of all prompts.
    """
    means = []
    for prompts in (harmless, harmful):
        rows = [render(tokenizer, prompt) for prompt in prompts]
        ids, mask = left_pad(rows, int(tokenizer.pad_token_id), model.device)
        options = {"position_ids": token_positions(mask), "output_hidden_states": True, "use_cache": False}
        with evaluating(model):
            states = model(input_ids=ids, attention_mask=mask, logits_to_keep=1, **options).hidden_states
        means.append(torch.stack([state[:, -1].float().mean(0) for state in states[1:-1]]))
    return nn.functional.normalize(means[1] - means[0], dim=1)


@contextmanager
def ablated(model: nn.Module, direction: Tensor) -> Iterator[None]:
    """Project ``direction`` (d,), of any length, out of all that is written to the residual stream.

    Raises CurvlibError where the model has no parts with the names of :data:`WRITERS`.
    """
    writers = [module for name, module in model.named_modules() if name.endswith(WRITERS)]
    if not writers:
        raise CurvlibError(f"{type(model).__name__} has no module called {', '.join(WRITERS)}: give a Llama-like model")
    with _hooked(dict.fromkeys(writers, partial(_project, direction / direction.norm()))):
        yield


def _project(unit: Tensor, _: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):  # attention's second output is its weights
        return (_project(unit, _, args, output[0]), *output[1:])
    r = unit.to(output)
    return output - (output @ r)[..., None] * r


@contextmanager
def rounded(model: nn.Module, *, shuffle: int | None = None) -> Iterator[None]:
    r"""Make the model compute as if its adapter were merged and :math:`W + \Delta W` stored in NF4 again.

    Hooks add each layer's rounding error. With a seed as ``shuffle`` the same errors stand at random places: as large a
    change that no rounding makes. Memory: that of the dense weights. CurvlibError where no 4-bit layer has an adapter.
    """
    adapted: list[Any] = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    layers = [layer for layer in adapted if isinstance(layer.base_layer, Linear4bit)]
    if not layers:
        raise CurvlibError("no 4-bit layer has an adapter, expected one at least: load the model with an adapter")
    draw, errors = torch.Generator().manual_seed(shuffle or 0), {}
    for layer in layers:
        weight = (
            dequantise(layer.base_layer).float() + layer.get_delta_weight(layer.active_adapters[0]).float().detach()
        )
        codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = dequantize_4bit(codes, state).view_as(weight) - weight
        if shuffle is not None:
            error = error.flatten()[torch.randperm(error.numel(), generator=draw).to(error.device)].view_as(error)
        errors[layer.base_layer] = partial(_add, error.cpu())  # 26 GB at 7B, too many for a GPU
    with _hooked(errors):
        yield


def _add(error: Tensor, _: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output + nn.functional.linear(args[0], error.to(args[0]))


@contextmanager
def _hooked(changes: dict[nn.Module, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, change in changes.items():
            stack.callback(module.register_forward_hook(change).remove)
        yield
