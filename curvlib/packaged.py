"""The small chat models that come in wheels of the package index: 4-bit GGUF files, made into plain checkpoints."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from curvlib import fetch
from curvlib.artifacts import artifact
from curvlib.cache import workspace
from curvlib.checkpoint import quiet
from curvlib.progress import say

# The name of the model, of its file in the registry and of its artefact, and what the world calls it.
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "qwen": "Qwen2.5-Coder-0.5B-Instruct"}


def prepare(name: str) -> Path:
    """Return the folder of a packaged model in bfloat16 safetensors, made once from its 4-bit GGUF file.

    SmolLM2 takes about half a minute and 1.5 GB of memory, Qwen a minute and 4 GB.
    """

    def build(target: Path) -> None:
        with workspace() as gguf:
            fetch.extract(name, gguf / "model.gguf")
            say(f"converting {MODELS[name]} to safetensors, once, in about a minute")
            convert(gguf, target)

    return artifact(name, {"wheel": fetch.registry()[name].sha256}, build)


def convert(gguf_folder: Path, target: Path) -> None:
    """Dequantise ``model.gguf`` and save it with its tokenizer to ``target`` as a plain bfloat16 checkpoint.

    The head is tied to the embedding, as both models publish it. Qwen's GGUF file holds the one matrix twice, rounded
    to 5 bits as the embedding and to 8 bits as the head; the embedding's numbers stay.
    """
    with quiet(), redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file="model.gguf", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file="model.gguf")
        # transformers marks the model as quantised although it dequantised it, and would refuse to save it
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
