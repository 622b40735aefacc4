"""What the Hessian, Gauss–Newton and Fisher operators share: batches, weights, the self-test, and sound models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from curvlib.curvature.operator import FunctionOperator, Operator, asymmetry, check_vector
from curvlib.errors import CurvlibError
from curvlib.nf4 import four_bit_layers, is_installed
from curvlib.parameters import Tensors, tensor_list

BatchT = TypeVar("BatchT")
SYMMETRY_TOLERANCE = 0.03  # rounding gives 1e-6 in float32 and up to 1e-2 in bfloat16; a wrong product gives about 0.5
DROPOUT_SETTINGS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout_p")


class BatchedOperator(Operator, Generic[BatchT]):
    r"""The weighted mean :math:`A v = \sum_b w_b A_b v / \sum_b w_b` of one product a batch, summed in the given order.

    Args:
        function: what is differentiated, ``function(batch)``; it reads the parameters wherever they live.
        parameters: tensors that require a gradient (a mapping or a sequence); their order is that of the vector.
        batches: any objects that ``function`` takes; at least one.
        weights: one number a batch, such as its count of answer tokens; equal ones by default.
        check: test on the first batch that every parameter gets a gradient and that the product is symmetric.

    Raises:
        CurvlibError: no batch, wrong weights, or a failed check.
    """

    def __init__(
        self,
        function: Callable[[BatchT], Tensor],
        parameters: Tensors,
        batches: Sequence[BatchT],
        weights: Sequence[float] | None = None,
        *,
        check: bool = True,
    ) -> None:
        self.function, self.parameters, self.batches = function, parameters, list(batches)
        self.weights = [1.0] * len(self.batches) if weights is None else [float(weight) for weight in weights]
        if not self.batches or len(self.weights) != len(self.batches) or sum(self.weights) <= 0:
            raise CurvlibError(
                f"{len(self.batches)} batches and {len(self.weights)} weights were given, expected at least one batch, "
                "one weight each and a positive sum"
            )
        tensors = tensor_list(parameters)
        self.size = sum(tensor.numel() for tensor in tensors)
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        if check:
            self._check()

    @property
    def weight(self) -> float:
        """The sum of the weights, such as the number of answer tokens in all batches."""
        return sum(self.weights)

    def batch_product(self, batch: BatchT, v: Tensor) -> Tensor:
        """Return the product of one batch's curvature with v; both (size,)."""
        raise NotImplementedError

    def matvec(self, v: Tensor) -> Tensor:
        """Return the weighted mean over batches of the products with v; both (size,)."""
        check_vector(self, v)
        result = torch.zeros_like(v)
        for batch, weight in zip(self.batches, self.weights, strict=True):
            result.add_(self.batch_product(batch, v), alpha=weight / self.weight)
        return result

    def _check(self) -> None:
        """Refuse parameters that get no gradient, and a first product that is not symmetric or not finite."""
        batch, targets = self.batches[0], tensor_list(self.parameters)
        names = list(self.parameters) if isinstance(self.parameters, dict) else list(range(len(targets)))
        with torch.enable_grad():
            total = self.function(batch).sum()
        grads = torch.autograd.grad(total, targets, allow_unused=True) if total.requires_grad else [None] * len(targets)
        missing = [name for name, grad in zip(names, grads, strict=True) if grad is None]
        if missing:
            raise CurvlibError(
                f"{len(missing)} of {len(targets)} parameters get no gradient (first: {missing[0]}): "
                "leave them out, or call curvlib.nf4.install(model) if the model is 4-bit"
            )
        first = FunctionOperator(partial(self.batch_product, batch), self.size, self.dtype, self.device)
        value = asymmetry(first)
        if not value <= SYMMETRY_TOLERANCE:  # also true for nan
            raise CurvlibError(
                f"the product is not symmetric (u·Av and v·Au differ by {value:.1e} of their scale, expected at most "
                f"{SYMMETRY_TOLERANCE}): switch off dropout and other randomness, and look for nan in the loss"
            )


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
