"""Shared cases: a tiny NF4 Llama with LoRA, its float64 dense twin, small dense problems, and comparers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

from curvlib import nf4
from curvlib.batches import IGNORED, Batch, Example, answer_logits, make_batches

VOCABULARY, HIDDEN, INTERMEDIATE = 128, 64, 192


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return ‖found − exact‖ / ‖exact‖, in float64."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    return float((found - exact).norm() / exact.norm())


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


@torch.no_grad()
def said_by_base(model: PeftModel, given: Sequence[Batch]) -> list[Batch]:
    """The same chats with the tokens that the model likes best without its adapter as the answers to predict."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with model.disable_adapter():
        likeliest = [answer_logits(model, batch).argmax(-1) for batch in given]
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    return [
        replace(batch, labels=batch.labels.masked_scatter(batch.labels != IGNORED, tokens))
        for batch, tokens in zip(given, likeliest, strict=True)
    ]


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A two-layer Llama with random weights, eager attention, in eval mode."""
    make: Any = LlamaConfig
    config = make(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{
            "vocab_size": VOCABULARY,
            "attn_implementation": "eager",
            "num_hidden_layers": 2,
            "intermediate_size": INTERMEDIATE,
            **settings,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.05)
    model.train(False)
    return model


def quantise(model: nn.Module) -> None:
    """Replace every linear layer but the output layer by bitsandbytes' NF4 with double quantisation, on the CPU."""
    make: Any = Linear4bit
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                layer = make(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=torch.float32,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer.to("cpu"))


def add_lora(model: nn.Module, rank: int = 2, dropout: float = 0.0, use_dora: bool = False) -> PeftModel:
    """Adapters on every linear layer, with B different from zero, so that A gets a gradient too."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft 0.21 asks the old name
        torch.manual_seed(1)
        make: Any = get_peft_model
        sizes = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": dropout, "use_dora": use_dora}
        config = LoraConfig(target_modules="all-linear", **sizes)
        adapted: PeftModel = make(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return adapted.eval()


def nf4_llama(*, installed: bool = True, device: str = "cpu", **settings: Any) -> PeftModel:
    """The tiny Llama in NF4 with LoRA; with ``installed=False`` on bitsandbytes' own matrix product."""
    model = llama(**settings)
    model.requires_grad_(False)
    quantise(model)
    if installed:
        nf4.install(model)
    adapted: PeftModel = add_lora(model).to(device)
    return adapted


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
    """The same function in float64 throughout, with dense, dequantised weights; of a dense model a copy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _dequantised(model) if isinstance(model, PeftModel) else copy.deepcopy(model).double()
        self.config: Any = getattr(model, "config", None)

    def get_base_model(self) -> Any:
        base = self.model
        return base.get_base_model() if isinstance(base, PeftModel) else base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Exact():
            return self.model(*args, **kwargs)


def _dequantised(model: PeftModel) -> nn.Module:
    base: Any = model.get_base_model()
    dense = LlamaForCausalLM(copy.deepcopy(base.config))
    dense.requires_grad_(False)
    twin = add_lora(dense, rank=model.peft_config["default"].r).to(model.device).double()
    with torch.no_grad():
        for name, target in twin.named_parameters():
            owner, _, attribute = name.rpartition(".")
            module: Any = model.get_submodule(owner)
            is_4bit = isinstance(module, Linear4bit) and attribute == "weight"
            target.copy_(nf4.dequantise(module) if is_4bit else getattr(module, attribute))
    return twin


@cache
def pair(device: str = "cpu") -> tuple[PeftModel, Twin]:
    """One 4-bit model and its twin for all tests that leave them as they are."""
    model = nf4_llama(device=device)
    return model, Twin(model)


class MLP(nn.Module):
    """A small dense float64 classifier: 3 inputs, 4 tanh units, 3 classes; 31 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(random(*parameter.shape, seed=number))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def classification(rows: int = 7, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random inputs (rows, 3) float64 and labels (rows,)."""
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    return random(rows, 3, seed=seed), labels


def explicit_gradients(outputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """One backward pass a number: the Jacobian (outputs, parameters) by plain autograd."""
    rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in outputs.reshape(-1)]
    return torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])


class SavedTensors:
    """Record what autograd keeps inside the ``with`` block: shapes, and the peak of bytes alive at once.

    Parameters of ``model`` are not counted, and a storage kept twice counts once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shapes: set[tuple[int, ...]] = set()
        self.peak = self._now = 0
        self._known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._alive: dict[int, int] = {}
        self._hooks: Any = torch.autograd.graph.saved_tensors_hooks(
            lambda t: Saved(self, t), lambda saved: saved.tensor
        )

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def change(self, tensor: Tensor, by: int) -> None:
        """Count one more or one less reference to the tensor's storage."""
        if tensor._is_zerotensor() or tensor.untyped_storage().data_ptr() in self._known:
            return
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        before = self._alive.get(key, 0)
        self._alive[key] = before + by
        self._now += size * (bool(before + by) - bool(before))
        self.peak = max(self.peak, self._now)


class Saved:
    """A saved tensor that reports its birth and death."""

    def __init__(self, record: SavedTensors, tensor: Tensor) -> None:
        self.record, self.tensor = record, tensor
        record.shapes.add(tuple(tensor.shape))
        record.change(tensor, 1)

    def __del__(self) -> None:
        self.record.change(self.tensor, -1)
