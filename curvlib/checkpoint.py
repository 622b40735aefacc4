"""Checks at load, of what a checkpoint or an adapter holds: what is not supported is refused by name, in one line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from curvlib.errors import CurvlibError
from curvlib.nf4 import four_bit_layers
from curvlib.progress import say

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that second derivatives go through
NO_JVP = ("bloom",)  # families with an own autograd function that has no forward derivative
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # initialisations that leave the base as it is
REFUSED = {  # settings that make another model than base + s·BA
    *("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "use_qalora"),
    *("use_bdlora", "alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config", "kasa_config"),
}
LITTLE = 0.5  # share of the layers' numbers in 4 bits below which it is told


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object from a file; raises CurvlibError where it holds none."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CurvlibError(f"cannot read {file} ({' '.join(str(error).split())[:120]}): give a whole folder") from error
    if not isinstance(content, dict):
        raise CurvlibError(f"{file} holds no JSON object: give a whole folder")
    return content


def stored_in_four_bits(source: str, folder: Path) -> bool:
    """Tell whether a checkpoint is stored in bitsandbytes' 4 bits; raises CurvlibError for any other quantisation."""
    settings = read_json(folder / "config.json").get("quantization_config")
    if not settings:
        return False
    method = settings.get("quant_method") or "bitsandbytes"
    if method != "bitsandbytes" or not settings.get("load_in_4bit", settings.get("_load_in_4bit")):
        kind = "bitsandbytes 8-bit" if method == "bitsandbytes" else method
        raise CurvlibError(
            f"{source!r} is stored in {kind}, expected a dense checkpoint or bitsandbytes 4-bit: give one"
        )
    return True


def check_model(source: str, model: PreTrainedModel, quantised: bool) -> None:
    """Refuse recurrent layers and numbers that are not finite; tell how little is in 4 bits where that was asked for.

    Raises:
        CurvlibError: one line that names the kind of layer, or the tensor.
    """
    config: Any = model.config
    config = config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION)
    if kinds or getattr(model, "_is_stateful", False) or config.model_type in NO_JVP:
        what = ", ".join(kinds) or config.model_type
        raise CurvlibError(
            f"{source!r} has layers ({what}) other than attention, or without a second derivative: give a decoder with "
            "attention in every layer, such as Llama, Qwen or Gemma"
        )
    layers = four_bit_layers(model)
    require_finite(source, model.named_parameters())
    for name, layer in layers.items():  # a block of 64 weights with a nan has a nan as its scale
        weight: Any = layer.weight
        state: Any = weight.quant_state or layer.quant_state
        scales = [state.offset, state.state2.absmax] if state.nested else [state.absmax]
        require_finite(source, ((f"{name}.weight", scale) for scale in scales))
    if not quantised:
        return
    four = sum(layer.in_features * layer.out_features for layer in layers.values())
    ends = {id(end.weight) for end in _ends(model) if end is not None}
    dense = sum(p.numel() for p in model.parameters() if p.is_floating_point() and p.ndim > 1 and id(p) not in ends)
    if not four:
        kind = next((type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear)), "none")
        what = f"no layer of {source!r} can be put in 4 bits (its linear layers are {kind})"
        raise CurvlibError(f"{what}: give a model of torch's own linear layers")
    if four < LITTLE * (four + dense):
        say(f"{four / (four + dense):.0%} of the numbers in {source!r}'s layers are in 4 bits; the rest stays dense")


def _ends(model: Any) -> tuple[Any, Any]:
    """Return the embedding and the output layer."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def require_finite(where: object, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise CurvlibError for the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CurvlibError(f"{name} of {where} holds numbers that are not finite: the file is broken, give another")


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the adapter in ``folder``.

    Raises:
        CurvlibError: the folder holds no adapter in peft format, or one that is more than plain LoRA, which is named.
    """
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        names = "no adapter_config.json with adapter_model.safetensors"
        raise CurvlibError(f"{folder} holds {names}: give a peft adapter, saved in safetensors")
    settings = read_json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise CurvlibError(f"{folder}: peft_type is {settings.get('peft_type')}, expected LORA: give a LoRA adapter")
    known = {field.name for field in fields(LoraConfig)} | {"runtime_config"}
    extra = [name for name, value in settings.items() if value and (name in REFUSED or name not in known)]
    if extra:
        names = ", ".join({"use_dora": "DoRA (use_dora)"}.get(name, name) for name in extra)
        raise CurvlibError(f"{folder} uses {names}, expected plain LoRA: train or convert it without")
    if settings.get("init_lora_weights") not in PLAIN_STARTS:
        raise CurvlibError(
            f"{folder} was started with init_lora_weights={settings['init_lora_weights']!r}, which changes the base: "
            "convert it to plain LoRA (peft: save_pretrained(path_initial_model_for_weight_conversion=…))"
        )
    return settings


def attach(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Return ``model`` under the LoRA adapter in ``folder``, trainable and in float32.

    Biases that the adapter trained have its numbers and stay frozen, since curvature is taken of LoRA's maps alone;
    ``adapted.base_biases`` holds each with the base's own numbers.

    Raises:
        CurvlibError: no plain LoRA adapter (see :func:`adapter_settings`), other tensors than the model has places for,
            a LoRA on the embedding or the output layer, or numbers that are not finite.
    """
    settings = adapter_settings(folder)
    biases = {id(p): p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    biases = biases if settings.get("bias", "none") != "none" else {}
    advice = "give the base that the adapter was trained on"
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            stored = set(file.keys())
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode, config.init_lora_weights = False, True  # its numbers are read next
        adapted = PeftModelForCausalLM(model, config)
        result = adapted.load_adapter(str(folder), "default", is_trainable=True)
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CurvlibError(f"the adapter {folder} does not fit {model.name_or_path!r} ({reason}): {advice}") from error
    ends = _ends(model)
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and (module in ends or isinstance(module.get_base_layer(), nn.Embedding)):
            raise CurvlibError(f"{folder} has LoRA on the embedding or output layer ({name}): train it without")
    places = get_peft_model_state_dict(adapted)
    lost = [f"{key} has no place" for key in result.unexpected_keys]
    lost += [f"{key} is no part of a LoRA" for key in stored if "lora_" not in key and not (biases and "bias" in key)]
    lost += [f"no tensor for {key}" for key in result.missing_keys]
    lost += [f"no tensor for {key}" for key in places if "lora_" not in key and key not in stored]
    if lost:
        raise CurvlibError(f"the adapter {folder} does not fit {model.name_or_path!r} ({lost[0]}): {advice}")
    require_finite(folder, places.items())
    frozen = [p.requires_grad_(False) for name, p in adapted.named_parameters() if name.endswith("bias")]
    trained: Any = [(p, biases[id(p)]) for p in frozen if id(p) in biases]
    adapted.base_biases = trained
    return adapted


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and warnings about loading off the screen; downloads still show their progress."""
    log: Any = logging  # it has no annotations
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
