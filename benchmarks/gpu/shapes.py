"""Models of published shapes without their weights, and what work on them takes.

Their tensors are never written, so that memory is only reserved. What ``forecast_memory`` counts grows by the same
bytes with every layer: it is counted for 2 and for 4 layers and extended.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any

import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, LlamaConfig, Qwen2Config

from curvlib import models, nf4
from curvlib.batches import IGNORED, Batch
from curvlib.curvature.hessian import hessian
from curvlib.curvature.memory import Rehearsal, forecast_memory, resident
from curvlib.parameters import trainable
from curvlib.prefix import cache_argument

SHAPES: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {  # words, width, inner width, layers, heads, kv heads
    "Qwen2.5-7B": (Qwen2Config, (152_064, 3584, 18_944, 28, 28, 4), {}),
    "Llama-3.1-8B": (LlamaConfig, (128_256, 4096, 14_336, 32, 32, 8), {}),
    "gemma-2-9b": (Gemma2Config, (256_000, 3584, 14_336, 42, 16, 8), {"head_dim": 256, "tie_word_embeddings": True}),
    "SmolLM2-135M": (LlamaConfig, (49_152, 576, 1536, 30, 9, 3), {"tie_word_embeddings": True}),
}
FIELDS = ("vocab_size", "hidden_size", "intermediate_size")
COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
RANK, SKETCH = 8, 32  # of the lessons' adapters, and of EK-FAC


@cache
def reserved(name: str, layers: int, device: str = "cpu", *, values: bool = False) -> Any:
    """Return a model of these shapes in NF4 under LoRA, float32, with tensors that nobody has written to.

    With ``values`` they are random ones, as a product that is run asks for.
    """
    make, sizes, options = SHAPES[name]
    with torch.device("meta"):
        config = make(**dict(zip(FIELDS + COUNTS, sizes, strict=True)) | {"num_hidden_layers": layers} | options)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for parent in list(model.modules()):
        for child, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and child != "lm_head":
                setattr(parent, child, four_bit(layer, device, values))
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    empty = (empty.normal_(0, 0.02) if empty.ndim == 2 else empty.fill_(1)) if values else empty
                    tensors[key] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    model.tie_weights()
    nf4.install(model.eval().requires_grad_(False))
    return models.add_lora(model, rank=RANK, seed=0)


def four_bit(layer: nn.Linear, device: str, values: bool) -> Linear4bit:
    """Return a 4-bit layer of the same shape with double quantisation."""
    count, (out, width) = layer.weight.numel(), layer.weight.shape
    if values:
        dense = torch.randn(out, width, device=device) / width**0.5
        codes, state = quantize_4bit(dense, compress_statistics=True, quant_type="nf4")
    else:
        make = partial(torch.empty, device=device)
        second = QuantState(make(-(-count // 2**14)), code=make(256), blocksize=256, dtype=torch.float32)
        scales = {"absmax": make(count // 64, dtype=torch.uint8), "offset": make(()), "state2": second}
        shape = {"shape": layer.weight.shape, "blocksize": 64, "dtype": torch.float32}
        state = QuantState(**scales, **shape, code=make(16), quant_type="nf4")
        codes = make(count // 2, 1, dtype=torch.uint8)
    with torch.device("meta"):
        made = Linear4bit(width, out, bias=layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4")
    options = {"quant_type": "nf4", "bnb_quantized": True}
    made.weight = Params4bit(codes, requires_grad=False, quant_state=state, module=made, **options)
    made.quant_state = state
    return made


def chats(count: int, tokens: int) -> Batch:
    """Return random chats with answers of at most 32 tokens."""
    ids = torch.randint(5, 100, (count, tokens), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = torch.arange(count)  # so that no beginning is shared
    place = torch.arange(tokens).expand_as(ids)
    return Batch(ids, torch.ones_like(ids), torch.where(place < max(tokens - 32, tokens // 2), IGNORED, ids))


def answers(model: Any, batch: Batch) -> int:
    """Return the bytes of reading prompts and writing a first token, with the cache."""
    record, more = Rehearsal(resident(model)), {cache_argument(model): DynamicCache(config=model.config)}
    with torch.no_grad(), record:
        for ids in (batch.input_ids, batch.input_ids[:, :1]):
            model(input_ids=ids, use_cache=True, logits_to_keep=1, **more)
    return record.peak


class Shapes:
    """Sizes of a model, in GB unless said otherwise."""

    def __init__(self, name: str) -> None:
        self.name, self.layers, self.words = name, SHAPES[name][1][3], SHAPES[name][1][0]

    def extended(self, count: Callable[[Any], int]) -> float:
        """Return a count of bytes at all layers, from those at 2 and at 4."""
        two, four = (count(reserved(self.name, layers)) for layers in (2, 4))
        return (two + (self.layers - 2) / 2 * (four - two)) / 1e9

    @cache  # noqa: B019  three models live as long as the script
    def peak(self, kind: str, count: int, tokens: int) -> float:
        """Return what a ``gradient``, a ``hessian`` product or ``answers`` takes beside the model."""
        batch = chats(count, tokens)
        if kind == "answers":
            return self.extended(partial(answers, batch=batch))
        make: Any = hessian if kind == "hessian" else kind
        return self.extended(lambda model: forecast_memory(model, make, batch).peak)

    @cached_property
    def weights(self) -> float:
        """The model in NF4, embeddings and adapter in float32."""
        return self.extended(lambda model: sum({t.data_ptr(): t.nbytes for t in resident(model)}.values()))

    @cached_property
    def vector(self) -> float:
        """A vector over all parameters of an adapter."""
        return self.extended(lambda model: sum(p.nbytes for p in trainable(model).values()))

    def linear(self, size: Callable[[Any], int]) -> float:
        """Return the sum of a size over the 4-bit layers, in 10^9."""
        return self.extended(lambda model: sum(map(size, nf4.four_bit_layers(model).values())))

    @cached_property
    def factors(self) -> float:
        """EK-FAC's d x d factors: of what q, of what o, of what gate and of what down reads, and of every output."""
        readers = ("q_proj", "o_proj", "gate_proj", "down_proj")

        def inputs(model: Any) -> int:
            named = nf4.four_bit_layers(model).items()
            return sum(4 * layer.in_features**2 for name, layer in named if any(part in name for part in readers))

        return self.extended(inputs) + self.linear(lambda layer: 4 * layer.out_features**2)

    @cached_property
    def sketches(self) -> float:
        """EK-FAC's columns, and their products while they are made."""
        return self.linear(lambda layer: 2 * 4 * SKETCH * (layer.in_features + layer.out_features))
