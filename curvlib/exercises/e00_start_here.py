"""Checks of notebook 00: four-bit levels, blocks, bits and the interval of a rate."""

import math

import torch
from torch import Generator

from curvlib.exercises.core import Answer, close, exercise, number, parts, refuse, require, tensor
from curvlib.exercises.draws import integer, randn

OUTERMOST = 0.9677083  # NF4's largest quantile, as QLoRA's code has it


@exercise(points=4)
def nf4_levels(answer: Answer, _: Generator) -> None:
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


@exercise(points=5)
def quantise(answer: Answer, generator: Generator) -> None:
    """Each weight is compared with all sixteen levels."""
    inner, weights = 0.01 + 0.98 * torch.rand(13, generator=generator).double(), randn(generator, 512)
    levels = torch.cat([-inner[:6], inner[6:], torch.tensor([-1.0, 0.0, 1.0])]).sort().values
    weights[5], weights[100] = -9.0, 7.0
    codes, scales = parts(answer(weights, levels), "codes", "scales")
    codes, scales, blocks = tensor(codes, 8, 64), tensor(scales, 8, 1), weights.view(8, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    refuse(scales, "block 0 holds -9, larger in size: take abs before max", blocks.amax(1, keepdim=True))
    deviations = [blocks.std(1, keepdim=True, correction=each) for each in (0, 1)]
    refuse(scales, "the scale is a standard deviation, which cuts outliers off: take abs and max", *deviations)
    require(scales.unique().numel() > 1, "each block of 64 has a scale of its own, so one outlier spoils one block")
    require(close(scales, largest), "the scale of a block is the largest magnitude in it")
    require(((codes >= 0) & (codes <= 15) & (codes == codes.round())).all(), "a code is an integer from 0 to 15")
    errors = (levels[codes.long()] * scales - blocks).abs()
    best = (levels * scales[..., None] - blocks[..., None]).abs().amin(-1)
    require((errors <= best + 1e-9).all(), "some weights are not at their nearest level: compare with the midpoints")


@exercise(points=2)
def bits_per_weight(answer: Answer, generator: Generator) -> None:
    """The bits of one whole group are counted."""
    block, group = 2 ** integer(generator, 5, 7), 2 ** integer(generator, 6, 8)
    value, weights = number(answer(block, group)), block * group
    require(value > 1, "fewer than one: give bits for each weight, neither bytes nor a share")
    refuse(value, "a 32-bit scale a block is what double quantisation does away with", 4 + 32 / block)
    refuse(value, "the 32-bit scale of the scales is missing: one for each group of blocks", 4 + 8 / block)
    refuse(value, "the 32 bits of a group serve group × block weights, all of its blocks", 4 + 8 / block + 32 / group)
    bits = 4 * weights + 8 * group + 32
    require(close(weights * value, bits), "count: 4 bits a weight, 8 bits a block, 32 bits a group of blocks")


@exercise(points=3)
def wilson_interval(answer: Answer, generator: Generator) -> None:
    """An end p of Wilson's interval lies 1.96 of its own standard errors from k / n."""
    n = integer(generator, 12, 40)
    k = integer(generator, 1, n // 3)
    low, high = map(number, parts(answer(n, n), "low", "high"))
    require(low < 1 - 1e-6, f"{n} of {n} does not prove 100 %: k/n ± 1.96 standard errors has no width there")
    require(high < 1 + 1e-9, "the interval of a rate ends at 1")
    low, high = map(number, parts(answer(k, n), "low", "high"))
    refuse(low + high, "the interval is centred at k/n: Wilson's centre moves towards one half", 2 * k / n)
    require(0 < low < k / n < high < 1, f"{k} of {n} lies inside its interval, and the interval inside 0 to 1")
    distances = [abs(k / n - end) / math.sqrt(end * (1 - end) / n) for end in (low, high)]
    require(max(distances) > 1.7, "the ends lie 1.645 standard errors away: that is 90 %, take 1.96 for 95 %")
    require(close(distances, [1.96] * 2, 2e-3), "an end p lies 1.96·sqrt(p(1-p)/n) from k/n: its own error, not k/n's")
