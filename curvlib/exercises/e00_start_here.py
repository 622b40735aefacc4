"""Checks of notebook 00: four-bit levels, blocks, bits and the interval of a rate."""

import torch

from curvlib.exercises.core import Answer, Draw, close, number, parts, refuse, require, tensor

OUTERMOST = 0.9677083  # NF4's largest quantile, as QLoRA's code has it


def nf4_levels(answer: Answer, _: Draw) -> None:
    """Φ, the inverse of the quantile function, must turn each half into evenly spaced shares."""
    levels = tensor(answer(), 16)
    gaps, above = levels.diff(), int((levels > 0).sum())
    require((gaps > 0).all(), "the levels must ascend: flip the half that descends")
    require(gaps.max() - gaps.min() > 1e-6, "the levels are evenly spaced: take quantiles of the normal distribution")
    require((levels == 0).any(), "no level is exactly zero: build the two halves apart and put 0 between them")
    require(above == 8, f"eight levels lie above zero and seven below: you have {above} above")
    require(abs(levels.max() - 1) < 1e-9, "the largest level must be 1: divide all levels by the largest")
    shares = torch.special.ndtr(levels * torch.special.ndtri(torch.tensor(OUTERMOST, dtype=levels.dtype)))
    gaps = torch.cat([7 * shares[:8].diff(), 8 * shares[7:].diff()])
    require(close(gaps, [OUTERMOST - 0.5] * 15), f"in each half quantiles run evenly from 0.5 to {OUTERMOST}")


def quantise(answer: Answer, draw: Draw) -> None:
    """Each weight is compared with all sixteen levels."""
    levels, weights = draw.normal(16).sort().values, draw.normal(512)
    weights[5], weights[100] = -9.0, 7.0
    codes, scales = parts(answer(weights, levels), codes=(8, 64), scales=(8, 1))
    blocks = weights.view(8, 64)
    deviations = [blocks.std(1, keepdim=True, correction=each) for each in (0, 1)]
    refuse(scales, "block 0 holds -9, larger in size: take abs before max", blocks.amax(1, keepdim=True))
    refuse(scales, "the scale is a standard deviation, which cuts outliers off: take abs and max", *deviations)
    require(scales.unique().numel() > 1, "each block of 64 has a scale of its own, so one outlier spoils one block")
    require(close(scales, blocks.abs().amax(1, keepdim=True)), "the scale of a block is the largest magnitude in it")
    require(((codes >= 0) & (codes <= 15) & (codes == codes.round())).all(), "a code is an integer from 0 to 15")
    errors = (levels[codes.long()] * scales - blocks).abs()
    best = (levels * scales[..., None] - blocks[..., None]).abs().amin(-1)
    require((errors <= best + 1e-9).all(), "some weights are not at their nearest level: compare with the midpoints")


def bits_per_weight(answer: Answer, draw: Draw) -> None:
    """The bits of one whole group are counted."""
    block, group = 2 ** draw.integer(5, 7), 2 ** draw.integer(6, 8)
    value, bits = number(answer(block, group)), 4 * block * group + 8 * group + 32
    require(value > 1, "fewer than one: give bits for each weight, neither bytes nor a share")
    refuse(value, "a 32-bit scale a block is what double quantisation does away with", 4 + 32 / block)
    refuse(value, "the 32-bit scale of the scales is missing: one for each group of blocks", 4 + 8 / block)
    refuse(value, "the 32 bits of a group serve group × block weights, all of its blocks", 4 + 8 / block + 32 / group)
    require(close(value * block * group, bits), "count: 4 bits a weight, 8 bits a block, 32 bits a group of blocks")


def wilson_interval(answer: Answer, draw: Draw) -> None:
    """An end p of Wilson's interval lies 1.96 of its own standard errors from k / n."""
    n = draw.integer(12, 40)
    k = draw.integer(1, n // 3)
    low, _ = parts(answer(n, n), low=(), high=())
    require(low < 1 - 1e-6, f"{n} of {n} does not prove 100 %: k/n ± 1.96 standard errors has no width there")
    ends = torch.stack(parts(answer(k, n), low=(), high=()))
    distances = (k / n - ends) / (ends * (1 - ends) / n).sqrt()
    refuse(ends.sum(), "the interval is centred at k/n: Wilson's centre moves towards one half", 2 * k / n)
    require(not distances.max() < 1.7, "the ends lie 1.645 standard errors away: that is 90 %, take 1.96 for 95 %")
    right = close(distances, [1.96, -1.96], 2e-3)
    require(right, "an end p lies 1.96·sqrt(p(1-p)/n) from k/n, below and above: its own error, not k/n's")
