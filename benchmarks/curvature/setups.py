"""The models and chats that are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from curvlib import data, models, nf4
from curvlib.batches import IGNORED, Batch
from curvlib.parameters import trainable


@dataclass(frozen=True)
class Setup:
    """A model in training mode without dropout, and where its tokens come from.

    Attributes:
        title: for the reader.
        model: with trainable parameters.
        tokens: one long row of token ids; chats are cut out of it.
        exact: whether a float64 twin fits beside it.
    """

    title: str
    model: nn.Module
    tokens: Tensor
    exact: bool = True

    def batch(self, rows: int, length: int) -> Batch:
        """Return ``rows`` chats of ``length`` tokens, the second half of each being the answer."""
        device = next(self.model.parameters()).device
        ids = self.tokens[: rows * length].view(rows, length).to(device)
        labels = ids.clone()
        labels[:, : length // 2] = IGNORED
        return Batch(ids, torch.ones_like(ids), labels)

    def vector(self) -> Tensor:
        """Return a standard normal vector over the trainable parameters, the same for every contestant."""
        first = next(iter(trainable(self.model).values()))
        size = sum(parameter.numel() for parameter in trainable(self.model).values())
        return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(first)


def dense(device: str) -> Setup:
    """A dense float32 Llama of 1.1 million random weights, all of them trainable."""
    model = random_llama(hidden=128, layers=4, heads=4, vocabulary=1024, device=device, dtype=torch.float32)
    return Setup("dense Llama, random weights, all trainable, float32", model.requires_grad_(True), random_tokens(1024))


def smollm2(device: str, *, rank: int = 8, layers: int | None = None, dtype: torch.dtype = torch.float32) -> Setup:
    """SmolLM2-135M-Instruct in NF4 under LoRA, on text that it knows; ``layers`` keeps the first ones only."""
    base: Any = models.load_model(device=device, dtype=dtype)
    if layers is not None:
        base.model.layers = base.model.layers[:layers]
        base.config.num_hidden_layers = layers
    return Setup(f"SmolLM2-135M, NF4, LoRA rank {rank}, {str(dtype)[6:]}", adapted(base, rank), text_tokens())


def llama7b(device: str, *, layers: int = 32, hidden: int = 4096, rank: int = 8) -> Setup:
    """A Llama of the shape of a 7B model, random weights in NF4, LoRA, bfloat16: memory and time need no training."""
    model = random_llama(hidden=hidden, layers=layers, heads=32, vocabulary=32_000, device=device, dtype=torch.bfloat16)
    quantise(model, torch.bfloat16)
    nf4.install(model)
    title = f"Llama of {layers} layers of {hidden}, random weights, NF4, LoRA rank {rank}, bfloat16"
    return Setup(title, adapted(model, rank), random_tokens(32_000), exact=False)


SETUPS: dict[str, Callable[[str], Setup]] = {"dense": dense, "smollm2_nf4": smollm2, "llama7b_nf4": llama7b}


def adapted(base: Any, rank: int) -> nn.Module:
    """Add LoRA whose B is not zero, so that A has curvature too; in training mode, which no layer here depends on.

    In evaluation mode bitsandbytes' own layers may repack their weights, and gradients through them vanish.
    """
    model = models.add_lora(base, rank=rank, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def random_llama(
    *, hidden: int, layers: int, heads: int, vocabulary: int, device: str, dtype: torch.dtype
) -> LlamaForCausalLM:
    """Return a Llama made on the device itself, with the proportions of the 7B model."""
    make: Any = LlamaConfig
    config = make(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=int(hidden * 43 / 16),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        attn_implementation="eager",
        dtype=dtype,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)


def quantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Put every linear layer but the output layer into NF4 with double quantisation, one after another."""
    make: Any = Linear4bit
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                shape, device = (child.in_features, child.out_features), child.weight.device
                layer = make(*shape, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
                layer.load_state_dict({"weight": child.weight.detach().cpu()})
                setattr(parent, name, layer.to(device))
    model.requires_grad_(False)


def random_tokens(vocabulary: int, count: int = 1 << 14) -> Tensor:
    """Return uniform tokens (count,)."""
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0))


@cache
def text_tokens(count: int = 1 << 14) -> Tensor:
    """Return the first tokens of encyclopaedia articles, (count,)."""
    text = "\n\n".join(data.prompts("text_test"))
    return torch.tensor(models.load_tokenizer()(text)["input_ids"][:count])
