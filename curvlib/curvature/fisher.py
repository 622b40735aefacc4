r"""Empirical Fisher products, from per-example gradients that are never stored.

With losses :math:`\ell_i` of n examples and :math:`g_i = \nabla_\theta \ell_i`,

.. math:: F v = \frac1n \sum_i g_i \,(g_i^\top v) = \frac1n J^\top J v, \qquad J = \partial \ell / \partial \theta .

One forward-mode pass gives all :math:`g_i^\top v`, one gradient their weighted sum. This is the matrix of the
*observed* answers; the Fisher matrix under the model's own predictions is :mod:`curvlib.curvature.ggn`. Source:
Kunstner et al. 2019, "Limitations of the empirical Fisher approximation", arXiv 1905.12558.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from curvlib.batches import Batch, chat_losses
from curvlib.curvature.batched import BatchedOperator, BatchT, require_sound
from curvlib.curvature.forward import jacobian_vector_product, vector_jacobian_product
from curvlib.parameters import Tensors, trainable


def fisher_vector_product(losses: Callable[[], Tensor], parameters: Tensors, v: Tensor) -> Tensor:
    """Return F v (P,) for ``losses()`` of shape (n,), one an example; costs about two gradients, first-order memory."""
    values, along_v = jacobian_vector_product(losses, parameters, v)
    return vector_jacobian_product(losses, parameters, along_v / len(values))


class EmpiricalFisherOperator(BatchedOperator[BatchT]):
    """The empirical Fisher matrix, from ``losses(batch)`` of shape (n,), one loss an example.

    See :class:`~curvlib.curvature.batched.BatchedOperator` for the arguments. Each batch counts as the mean over its
    examples, so pass ``weights=[len(batch) for batch in batches]`` for the mean over all examples.
    """

    def batch_product(self, batch: BatchT, v: Tensor) -> Tensor:
        """Return one batch's F v."""
        return fisher_vector_product(partial(self.function, batch), self.parameters, v)


def fisher(
    model: nn.Module, batches: Sequence[Batch], parameters: Tensors | None = None, *, check: bool = True
) -> EmpiricalFisherOperator[Batch]:
    """Return the empirical Fisher operator with one example a chat: its mean loss over its own answer tokens.

    Raises:
        CurvlibError: the model or the parameters are not fit for second-order products (see ``check``).
    """
    targets = trainable(model) if parameters is None else parameters
    losses = partial(chat_losses, model)
    if check:
        require_sound(model)
        EmpiricalFisherOperator(losses, targets, [batches[0].rows(0, 1)])
    return EmpiricalFisherOperator(losses, targets, batches, [len(batch) for batch in batches], check=False)
