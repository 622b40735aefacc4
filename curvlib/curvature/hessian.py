r"""Exact Hessian products by reverse-over-reverse differentiation.

.. math:: H v = \nabla_\theta \left( \nabla_\theta L(\theta)^\top v \right)

Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian". The gradient is differentiated a second time
rather than in forward mode because torch has no forward derivative of SiLU's backward; the first-order graph of a 4-bit
layer holds no weight (:mod:`curvlib.nf4`), hence neither does the second-order one. Softmax, cross-entropy, adapted
layers, norms and gated units have their second derivative in closed form (:mod:`curvlib.curvature.closed_form`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from curvlib.batches import Batch, answer_loss
from curvlib.curvature.batched import BatchedOperator, BatchT, require_sound
from curvlib.curvature.closed_form import ClosedForm, fused
from curvlib.curvature.forward import flat_gradient
from curvlib.parameters import Tensors, tensor_list, trainable, unflatten


def hessian_vector_product(loss: Callable[[], Tensor], parameters: Tensors, v: Tensor) -> Tensor:
    r"""Return :math:`H v` (P,) for a scalar ``loss()``; costs 2 to 3 gradients (2.1 on SmolLM2 in NF4).

    Memory: the graph of the gradient on top of that of the loss, about twice a first-order gradient's.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_vector_product(lambda: x[0] ** 2 * x[1], [x], torch.tensor([1.0, 0.0]))
    tensor([4., 2.])
    """
    targets = tensor_list(parameters)
    with torch.enable_grad():
        with ClosedForm():
            value = loss()
        grads = torch.autograd.grad(value, targets, create_graph=True, materialize_grads=True)
    curved = [(grad, piece) for grad, piece in zip(grads, unflatten(v, targets), strict=True) if grad.requires_grad]
    if not curved:  # a linear loss
        return torch.zeros_like(v)
    return flat_gradient([grad for grad, _ in curved], targets, [piece for _, piece in curved])


class HessianOperator(BatchedOperator[BatchT]):
    """The Hessian of a loss, from ``loss(batch)``, a scalar that is a mean over the batch.

    See :class:`~curvlib.curvature.batched.BatchedOperator` for the arguments. Smaller batches need less memory.
    """

    def batch_product(self, batch: BatchT, v: Tensor) -> Tensor:
        """Return one batch's H v."""
        return hessian_vector_product(partial(self.function, batch), self.parameters, v)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    with fused(model):
        return answer_loss(model, batch)


def hessian(
    model: nn.Module,
    batches: Sequence[Batch],
    parameters: Tensors | None = None,
    *,
    rows: int | None = None,
    check: bool = True,
) -> HessianOperator[Batch]:
    """Return the Hessian of the mean loss over all answer tokens, for the trainable parameters (or those given).

    Args:
        model: a causal language model with eager attention and, if 4-bit, ``nf4.install``.
        batches: chats; each token counts equally, whatever the batch sizes.
        parameters: a subset, such as one layer's, for that diagonal block alone.
        rows: differentiate at most this many chats at once. Memory falls in proportion, and 4-bit weights are
            dequantised once more per part; half of the batch needs about the memory of its first-order gradient.
        check: refuse an unsound model or set-up, at the cost of about six gradients of one chat.

    Raises:
        CurvlibError: the model or the parameters are not fit for second-order products.
    """
    targets = trainable(model) if parameters is None else parameters
    loss = partial(_loss, model)
    if check:
        require_sound(model)
        HessianOperator(loss, targets, [batches[0].rows(0, 1)])
    parts = [part for batch in batches for part in batch.parts(rows or len(batch))]
    return HessianOperator(loss, targets, parts, [part.tokens for part in parts], check=False)
