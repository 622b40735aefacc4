"""Shared cases: a tiny NF4 Llama with LoRA, its float64 dense twin, small dense problems, and comparers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

from curvlib import nf4
from curvlib.batches import Batch, Example, make_batches

VOCABULARY, HIDDEN, INTERMEDIATE = 128, 64, 192


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return ‖found − exact‖ / ‖exact‖, in float64."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that leave the global generator alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spd(size: int, seed: int = 0, condition: float = 100.0) -> Tensor:
    """A symmetric positive definite float64 matrix with eigenvalues spread evenly in logarithm up to ``condition``."""
    basis = torch.linalg.qr(random(size, size, seed=seed)).Q
    values = torch.logspace(0, torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    matrix: Tensor = basis * values @ basis.T
    return (matrix + matrix.T) / 2


def batches(count: int = 6, size: int = 3, seed: int = 0) -> list[Batch]:
    """Random chats of unequal lengths, at most 11 tokens, with answers of 2 to 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        head, tail = 3 + (5 * number) % 5 + number % 3, 2 + number % 3
        tokens = torch.randint(1, VOCABULARY, (head + tail,), generator=generator).tolist()
        examples.append(Example(tuple(tokens), (*[-100] * head, *tokens[head:])))
    return make_batches(examples, size, pad_id=0)


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A two-layer Llama with random weights, eager attention, in eval mode."""
    make: Any = LlamaConfig
    config = make(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"attn_implementation": "eager", **settings},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()


def quantise(model: nn.Module) -> None:
    """Replace every linear layer but the output layer by bitsandbytes' NF4 with double quantisation, on the CPU."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                layer = Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=torch.float32,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer.to("cpu"))


def add_lora(model: nn.Module, rank: int = 2) -> PeftModel:
    """Adapters on every linear layer, with B different from zero, so that A gets a gradient too."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft 0.21 asks the old name
        torch.manual_seed(1)
        make: Any = get_peft_model
        adapted: PeftModel = make(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    return adapted.eval()


def nf4_llama(*, installed: bool = True, **settings: Any) -> PeftModel:
    """The tiny Llama in NF4 with LoRA; with ``installed=False`` on bitsandbytes' own matrix product."""
    model = llama(**settings)
    model.requires_grad_(False)
    quantise(model)
    if installed:
        nf4.install(model)
    return add_lora(model)


class Exact(TorchFunctionMode):
    """Turn every explicit request for float32 (in RMSNorm, softmax, rotary embedding) into float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        widen = {torch.float32: torch.float64}
        keywords = {name: _swap(value, widen) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*[_swap(value, widen) for value in args], **keywords)


def _swap(value: Any, table: dict[Any, Any]) -> Any:
    return table.get(value, value) if isinstance(value, torch.dtype) else value


class Twin(nn.Module):
    """The same function in float64 throughout, with dense, dequantised weights."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        dense = LlamaForCausalLM(copy.deepcopy(model.get_base_model().config))
        dense.requires_grad_(False)
        self.model = add_lora(dense).double()
        with torch.no_grad():
            for name, target in self.model.named_parameters():
                owner, _, attribute = name.rpartition(".")
                module = model.get_submodule(owner)
                is_4bit = isinstance(module, Linear4bit) and attribute == "weight"
                target.copy_(nf4.dequantise(module) if is_4bit else getattr(module, attribute))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Exact():
            return self.model(*args, **kwargs)


def dense_hessian(loss: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """The Hessian of ``loss(theta)`` by torch's own dense routine."""
    hessian: Any = torch.autograd.functional.hessian
    result: Tensor = hessian(loss, theta)
    return result
