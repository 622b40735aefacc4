r"""Generalised Gauss–Newton products for a softmax cross-entropy.

With logits :math:`z_n(\theta) \in \mathbb{R}^V` of N answer tokens and :math:`p_n = \mathrm{softmax}(z_n)`,

.. math:: G = \frac1N \sum_n J_n^\top \left(\mathrm{diag}(p_n) - p_n p_n^\top\right) J_n ,
    \qquad J_n = \partial z_n / \partial \theta .

G is the Hessian without the second derivatives of the network, hence positive semi-definite, and equals the Fisher
matrix under the model's own predictions. Source: Schraudolph 2002, "Fast curvature matrix-vector products for
second-order gradient descent"; Martens 2020, arXiv 1412.1193.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from curvlib.batches import Batch, answer_logits, at_least_float32
from curvlib.curvature.batched import BatchedOperator, BatchT, require_sound
from curvlib.curvature.forward import jacobian_vector_product, vector_jacobian_product
from curvlib.parameters import Tensors, trainable

CHUNK = 1 << 22  # logits worked on at once: 16 MB in float32, small beside the logits of a whole batch


@torch.no_grad()
def softmax_hessian_product(logits: Tensor, tangent: Tensor) -> Tensor:
    r"""Return :math:`\frac1N(\mathrm{diag}(p_n) - p_n p_n^\top)\,t_n` for each row; all (N, V).

    Computed as :math:`p_n (t_n - \langle p_n, t_n\rangle)` after t_n was shifted to 0 at the likeliest class, which
    leaves the product unchanged: where that class has almost all of the mass, unshifted values cancel. Torch's
    ``softmax`` is not used: in float32 its sum over 49 152 classes is off by 1e-5. Works on few rows at a time, so that
    it holds one array of that shape besides its arguments.

    >>> softmax_hessian_product(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
    tensor([[ 0.2500, -0.2500]])
    """
    result = torch.empty_like(tangent)
    rows = max(1, CHUNK // logits.shape[1])
    for z, t, out in zip(logits.split(rows), tangent.split(rows), result.split(rows), strict=True):
        z, t = at_least_float32(z), at_least_float32(t)
        p = (z - z.logsumexp(dim=1, keepdim=True)).exp_()
        t = t - t.gather(1, p.argmax(dim=1, keepdim=True))
        mean = (p * t).sum(dim=1, keepdim=True)
        out.copy_(p.mul_(t.sub_(mean)).div_(len(logits)))
    return result


def ggn_vector_product(logits: Callable[[], Tensor], parameters: Tensors, v: Tensor) -> Tensor:
    r"""Return :math:`G v` (P,) for ``logits()`` of shape (N, V) and the mean cross-entropy over its rows.

    One forward-mode pass without graph gives :math:`J v`, the closed form the softmax Hessian, one gradient
    :math:`J^\top u`. Cost: about two gradients; memory: that of one first-order gradient.
    """
    value, tangent = jacobian_vector_product(logits, parameters, v)
    u = softmax_hessian_product(value, tangent)
    del value, tangent
    return vector_jacobian_product(logits, parameters, u)


class GGNOperator(BatchedOperator[BatchT]):
    """The generalised Gauss–Newton matrix of the mean cross-entropy, from ``logits(batch)`` of shape (N, V).

    See :class:`~curvlib.curvature.batched.BatchedOperator` for the arguments. Each batch counts as the mean over its
    rows, so pass ``weights=[batch.tokens for batch in batches]`` for the mean over all answer tokens.
    """

    def batch_product(self, batch: BatchT, v: Tensor) -> Tensor:
        """Return one batch's G v."""
        return ggn_vector_product(partial(self.function, batch), self.parameters, v)


def ggn(
    model: nn.Module, batches: Sequence[Batch], parameters: Tensors | None = None, *, check: bool = True
) -> GGNOperator[Batch]:
    """Return the Gauss–Newton operator of the mean loss over all answer tokens, for the trainable parameters.

    Raises:
        CurvlibError: the model or the parameters are not fit for second-order products (see ``check``).
    """
    targets = trainable(model) if parameters is None else parameters
    logits = partial(answer_logits, model)
    if check:
        require_sound(model)
        GGNOperator(logits, targets, [batches[0].rows(0, 1)])
    return GGNOperator(logits, targets, batches, [batch.tokens for batch in batches], check=False)
