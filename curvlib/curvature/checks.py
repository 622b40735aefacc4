"""What makes second-order products of a model wrong or impossible, refused before any work."""

from __future__ import annotations

from torch import nn

from curvlib.errors import CurvlibError
from curvlib.nf4 import four_bit_layers, is_installed

DROPOUT_SETTINGS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout_p")


def require_sound(model: nn.Module) -> None:
    """Refuse active dropout, fused attention, reentrant checkpointing and 4-bit layers without ``nf4.install``.

    Raises:
        CurvlibError: one line that names the culprit and the cure.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention not in (None, "eager"):
        raise CurvlibError(
            f"attention is '{attention}', which has no second derivative: "
            "load the model with attn_implementation='eager'"
        )
    for name, module in model.named_modules():
        if getattr(module, "lora_variant", None):  # peft detaches its weight norm: not the derivative
            raise CurvlibError(f"'{name}' is DoRA or another variant of LoRA: use a plain LoRA adapter")
        _require_no_dropout(name, module)
        _require_plain_checkpointing(name, module)
    for name, layer in four_bit_layers(model).items():
        if not is_installed(layer):
            raise CurvlibError(f"layer '{name}' is 4-bit but not differentiable twice: call curvlib.nf4.install(model)")


def _require_no_dropout(name: str, module: nn.Module) -> None:
    if not module.training:
        return
    rates = [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
    rates += [getattr(module, setting, 0.0) for setting in DROPOUT_SETTINGS]
    if any(isinstance(rate, float) and rate > 0 for rate in rates):
        raise CurvlibError(f"'{name}' applies dropout, so each product would differ: call model.eval() or set it to 0")


def _require_plain_checkpointing(name: str, module: nn.Module) -> None:
    if not (getattr(module, "gradient_checkpointing", False) and module.training):
        return
    keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    if keywords.get("use_reentrant", True):
        raise CurvlibError(
            f"'{name}' uses reentrant checkpointing, which has no second derivative: call "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )
