"""Is it right? Leave-one-out retraining, the linear datamodeling score, and how well a ranking finds the poison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from curvlib.errors import CurvlibError
from curvlib.evaluate.stats import RESAMPLES, Estimate

Retrain = Callable[[Sequence[int]], Tensor]
Array = NDArray[np.float64]


def leave_one_out(retrain: Retrain, n: int) -> Tensor:
    """Return for each query and example f(with it) - f(without it), (m, n): what an influence score predicts.

    ``retrain(kept)`` trains on the examples of these numbers and returns the query losses (m,). Cost: n + 1 trainings.
    """
    everything = retrain(range(n))
    return torch.stack([everything - retrain([j for j in range(n) if j != i]) for i in range(n)], dim=1)


def ridge_leave_one_out(x: Tensor, y: Tensor, queries: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    r"""Return the exact and the predicted effect of each point on ½(query error)², (m, n) each, for ridge regression.

    With :math:`L = \frac1{2n}\sum_i (x_i^\top\theta - y_i)^2 + \frac\lambda2\|\theta\|^2` and
    :math:`A = X^\top X/n + \lambda I`, taking point i out moves the optimum by exactly

    .. math:: \Delta_i = \frac{A^{-1} x_i\, e_i / n}{1 - h_i}, \qquad h_i = x_i^\top A^{-1} x_i / n,
        \quad e_i = x_i^\top\theta - y_i

    (Sherman-Morrison). Influence leaves the leverage :math:`h_i` out. Shapes: x (n, d), y (n,), queries (m, d),
    targets (m,).

    >>> x, y = torch.ones(2, 1).double(), torch.tensor([0.0, 1.0]).double()
    >>> exact, predicted = ridge_leave_one_out(x, y, x[:1], y[:1], ridge=1.0)
    >>> exact.round(decimals=3).tolist(), predicted.round(decimals=3).tolist()
    ([[-0.024, 0.031]], [[-0.016, 0.047]])
    """
    n = len(x)
    inverse = torch.linalg.inv(x.T @ x / n + ridge * torch.eye(x.shape[1], dtype=x.dtype))
    theta = inverse @ x.T @ y / n
    errors, moved = x @ theta - y, x @ inverse
    leverage = (moved * x).sum(dim=1) / n
    without = theta + moved * (errors / n / (1 - leverage))[:, None]
    now = queries @ theta - targets
    exact = now.square()[:, None] / 2 - (queries @ without.T - targets[:, None]).square() / 2
    return exact, -now[:, None] * (queries @ (moved * (errors / n)[:, None]).T)


def subsets(n: int, count: int, *, share: float = 0.5, seed: int = 0) -> list[list[int]]:
    """Return ``count`` random subsets of ``share`` · n numbers below n, each in ascending order."""
    generator = np.random.default_rng(seed)
    return [sorted(generator.choice(n, round(share * n), replace=False).tolist()) for _ in range(count)]


def datamodeling_score(scores: Tensor, chosen: Sequence[Sequence[int]], losses: Tensor, *, seed: int = 0) -> Estimate:
    r"""Estimate the linear datamodeling score: does the sum of influences order the losses of retrained models?

    For each query the rank correlation over subsets S of the measured loss with :math:`\sum_{i \in S} I_i`; the value
    is their mean over queries, from -1 to 1, and 0 for scores without any information. The interval resamples the
    subsets. Source: Park et al., arXiv 2303.14186.

    Args:
        scores: (m, n).
        chosen: the M subsets.
        losses: (m, M), each query's loss after training on each subset.
        seed: of the bootstrap.

    Raises:
        CurvlibError: the shapes do not fit, or fewer than three subsets.
    """
    return _estimate(_resampled(scores, chosen, losses, seed), len(chosen))


def datamodeling_gain(
    scores: Tensor, others: Tensor, chosen: Sequence[Sequence[int]], losses: Tensor, *, seed: int = 0
) -> Estimate:
    """Estimate by how much the :func:`datamodeling_score` of ``scores`` exceeds that of ``others``, on equal subsets.

    Shapes, errors and cost are those of two scores; the interval resamples the subsets for both at once.
    """
    one, other = (_resampled(found, chosen, losses, seed) for found in (scores, others))
    return _estimate(one - other, len(chosen))


def _estimate(drawn: Array, n: int) -> Estimate:
    """Return the first value with the interval of the others."""
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return Estimate(float(drawn[0]), float(low), float(high), n)


def _resampled(scores: Tensor, chosen: Sequence[Sequence[int]], losses: Tensor, seed: int) -> Array:
    """Return the score on all subsets, then on subsets drawn anew."""
    if losses.shape != (len(scores), len(chosen)) or len(chosen) < 3:
        raise CurvlibError(
            f"scores {tuple(scores.shape)}, losses {tuple(losses.shape)} and {len(chosen)} subsets were given, "
            "expected (m, n), (m, M) and M of at least 3"
        )
    predicted = torch.stack([scores[:, list(part)].sum(dim=1) for part in chosen], dim=1).double().numpy()
    measured = losses.double().numpy()
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(chosen), size=(RESAMPLES // 4, len(chosen)))
    every = np.arange(len(chosen))
    return np.array([rank_correlations(predicted[:, draw], measured[:, draw]).mean() for draw in (every, *draws)])


def rank_correlations(first: ArrayLike, second: ArrayLike) -> Array:
    """Return Spearman's correlation along the last axis; 0 where one side is constant.

    >>> rank_correlations([[1.0, 2.0, 3.0]], [[1.0, 4.0, 9.0]])
    array([1.])
    """
    ranks = [stats.rankdata(side, axis=-1) for side in (first, second)]
    a, b = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
    scale = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    result: Array = (a * b).sum(axis=-1) / np.where(scale > 0, scale, 1.0)
    return result


def auroc(suspicion: ArrayLike, poisoned: ArrayLike, *, seed: int = 0) -> Estimate:
    """Estimate the chance that a poisoned chat is ranked above a clean one (ties count half); 0.5 knows nothing.

    The interval resamples poisoned and clean chats, each among themselves.

    Raises:
        CurvlibError: no poisoned or no clean chat.
    """
    values, flags = np.asarray(suspicion, dtype=float), np.asarray(poisoned, dtype=bool)
    if values.shape != flags.shape or flags.all() or not flags.any():
        raise CurvlibError(
            f"{flags.sum()} poisoned among {flags.size} chats and {values.size} scores were given, "
            "expected one score a chat and both kinds"
        )
    above = values[flags][:, None] - values[~flags][None]
    wins = (above > 0) + 0.5 * (above == 0)
    generator = np.random.default_rng(seed)
    rows, columns = (generator.integers(size, size=(RESAMPLES, size)) for size in wins.shape)
    drawn = [wins[i][:, j].mean() for i, j in zip(rows, columns, strict=True)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(wins.mean()), float(low), float(high), len(values))


def precision_at(suspicion: ArrayLike, poisoned: ArrayLike, count: int) -> float:
    """Return the share of poisoned chats among the ``count`` most suspicious ones.

    >>> precision_at([3.0, 1.0, 2.0], [True, True, False], 2)
    0.5
    """
    return float(np.asarray(poisoned, dtype=float)[most_suspicious(suspicion, count)].mean())


def most_suspicious(suspicion: ArrayLike, count: int) -> list[int]:
    """Return the numbers of the ``count`` chats of highest suspicion, the highest first."""
    order: list[int] = np.argsort(-np.asarray(suspicion, dtype=float), kind="stable")[:count].tolist()
    return order
