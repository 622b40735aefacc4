r"""The Fisher matrix of a few chats, kept as their gradients and inverted exactly by Woodbury's identity.

With the gradients of n sampled chats as the rows of U (n, P), scaled so that :math:`F = U^\top U`,

.. math:: (F + \lambda I)^{-1} v = \tfrac1\lambda \bigl(v - U^\top (U U^\top + \lambda I_n)^{-1} U v\bigr),

which asks for one n × n factorisation and two products with U. When labels are drawn from the model, the expectation of
F is the generalised Gauss-Newton matrix of the mean loss (Martens, arXiv 1412.1193).

One backward pass a batch gives all its chats' gradients. A linear map :math:`z_t = W a_t` contributes
:math:`\sum_t g_t a_t^\top` to the gradient of one chat, with :math:`g_t` the gradient at its output: hooks collect a
and g, and one product a map gives the rows (Goodfellow 2015, arXiv 1510.01799).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from curvlib.batches import Batch
from curvlib.curvature.kfac import Fisher, chat_products, flat_places, linear_maps, visit_maps
from curvlib.curvature.operator import Operator
from curvlib.errors import CurvlibError
from curvlib.parameters import trainable


class LowRankOperator(Operator):
    r"""The matrix :math:`U^\top U` of size P, for rows U (n, P) with n much smaller than P.

    >>> operator = LowRankOperator(torch.tensor([[3.0, 0.0]]))
    >>> operator.matvec(torch.tensor([1.0, 1.0]))
    tensor([9., 0.])
    >>> operator.inverse(1.0).matvec(torch.tensor([10.0, 1.0]))
    tensor([1., 1.])
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.size, self.dtype, self.device = rows.shape[1], rows.dtype, rows.device

    def matvec(self, v: Tensor) -> Tensor:
        """Return the product with v, (P,), on its device; cost: two products with U, where the rows are."""
        return (self.rows.T @ (self.rows @ v.to(self.device))).to(v.device)

    @property
    def scale(self) -> float:
        """The mean of the n eigenvalues that are not zero, the natural unit of damping."""
        return sum(float(row.square().sum()) for row in self.rows) / len(self.rows)  # at once would copy all rows

    def inverse(self, damping: float) -> LowRankInverse:
        r"""Return :math:`(U^\top U + \lambda I)^{-1}` as an operator.

        Raises:
            CurvlibError: the damping is not positive; the matrix itself is singular.
        """
        if not damping > 0:
            raise CurvlibError(f"damping is {damping}, expected a positive number: a low-rank matrix is singular")
        return LowRankInverse(self.rows, damping)


class LowRankInverse(Operator):
    """The inverse of a damped :class:`LowRankOperator`, by Woodbury's identity."""

    def __init__(self, rows: Tensor, damping: float) -> None:
        self.rows, self.damping = rows, damping
        self.size, self.dtype, self.device = rows.shape[1], rows.dtype, rows.device
        gram = (rows @ rows.T).double()  # n × n: float64 costs nothing here and keeps small eigenvalues
        self.factor = torch.linalg.cholesky(gram + damping * torch.eye(len(rows), device=rows.device).double())

    def matvec(self, v: Tensor) -> Tensor:
        """Return the product with v, (P,), on its device; cost: two products with U."""
        inner = torch.cholesky_solve((self.rows @ v.to(self.device)).double()[:, None], self.factor)[:, 0]
        return (v - (self.rows.T @ inner.to(self.dtype)).to(v.device)) / self.damping


def chat_gradients(
    model: nn.Module,
    batch: Batch,
    *,
    fisher: Fisher = "empirical",
    labels: torch.Generator | None = None,
    draws: int = 1,
) -> Tensor:
    """Return the gradient of each chat's loss, summed over its answer tokens, in float32 at least: (draws × B, P).

    Args:
        model: a causal language model whose trainable parameters are LoRA's, or those of linear layers.
        batch: chats.
        fisher: ``empirical`` differentiates the given answers, ``sampled`` answers drawn from the model's predictions.
        labels: draws them.
        draws: sets of labels, one after the other in the rows; they share the forward pass.

    Cost: one gradient of the batch, and a backward pass for each further draw; memory draws × B × P numbers.

    Raises:
        CurvlibError: a trainable parameter is not the weight of one linear map, or takes no part in the loss.
    """
    maps, places = linear_maps(model), flat_places(model)
    parameters = trainable(model).values()
    first = next(iter(parameters))
    size = sum(parameter.numel() for parameter in parameters)
    wide = torch.promote_types(first.dtype, torch.float32)
    rows = torch.zeros(draws, len(batch), size, device=first.device, dtype=wide)
    done: Counter[str] = Counter()

    def visit(name: str, a: Tensor, g: Tensor, _: Tensor) -> None:
        weight = maps[name].weight
        start = places[id(weight)]
        rows[done[name], :, start : start + weight.numel()] = chat_products(a, g).flatten(1)
        done[name] += 1

    visit_maps(model, batch, maps, visit, fisher, labels or torch.Generator(first.device), draws)
    return rows.flatten(0, 1)


def sampled_fisher(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    weights: Sequence[float] | None = None,
    samples: int = 2,
    seed: int = 0,
) -> LowRankOperator:
    r"""Return the Fisher matrix of the mean answer-token loss over the trainable parameters, from sampled labels.

    A row of U is :math:`(N S)^{-1/2}\,\nabla_\theta \sum_t \log p_\theta(\hat y_t \mid x, y_{<t})` of one chat, with
    each label :math:`\hat y_t` drawn from the model, N the answer tokens of all chats and S the draws a chat.

    Args:
        model: its trainable parameters are LoRA's, or those of linear layers.
        batches: chats.
        weights: a factor on the share of each batch in the matrix.
        samples: draws of labels for each chat; n = samples × chats rows.
        seed: of the draws.

    Cost: one gradient of all chats and a backward pass for each further draw; memory n × P numbers and a batch's rows.
    Rows that take more than an eighth of a GPU's free memory stay in the host's, and so do the products with them.

    Raises:
        CurvlibError: see :func:`chat_gradients`.
    """
    parameters = list(trainable(model).values())
    labels = torch.Generator(parameters[0].device).manual_seed(seed)
    total = sum(batch.tokens for batch in batches) * samples
    size, count = sum(parameter.numel() for parameter in parameters), samples * sum(len(batch) for batch in batches)
    home = _home(count * size * parameters[0].itemsize, parameters[0].device)
    rows, end = torch.empty(count, size, dtype=parameters[0].dtype, device=home), 0
    for number, batch in enumerate(batches):  # one after the other into their place: no second copy of all rows
        drawn = chat_gradients(model, batch, fisher="sampled", labels=labels, draws=samples)
        if weights is not None:
            drawn *= weights[number] ** 0.5
        rows[end : end + len(drawn)], end = drawn, end + len(drawn)
    return LowRankOperator(rows.mul_(total**-0.5))


def _home(needed: int, device: torch.device) -> torch.device:
    """Return where so many bytes of rows stay."""
    fits = device.type == "cpu" or needed <= torch.cuda.mem_get_info(device)[0] / 8
    return device if fits else torch.device("cpu")
