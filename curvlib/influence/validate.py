"""Is it right? The linear datamodeling score, and how well a ranking finds the poison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from curvlib.errors import CurvlibError
from curvlib.evaluate.stats import RESAMPLES, Estimate

Array = NDArray[np.float64]


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
    drawn = _resampled(scores, chosen, losses, seed)
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return Estimate(float(drawn[0]), float(low), float(high), len(chosen))


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
