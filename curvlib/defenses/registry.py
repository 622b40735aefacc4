"""Every method by name, in the order of tables and figures: to add one is one line here."""

from __future__ import annotations

from curvlib.defenses import (
    dare,
    ema,
    linear,
    lookahead,
    lox,
    mixture,
    panacea,
    qrealign,
    reference,
    resta,
    restoration,
    safelora,
    slerp,
    stableun,
)
from curvlib.defenses.method import Method

_ALL = (
    reference.UNDEFENDED,
    reference.ALIGNED,
    ema.EMA,
    lookahead.REAL,
    lookahead.VIRTUAL,
    panacea.PANACEA,
    mixture.MIXTURE,
    lox.LOX,
    linear.LINEAR,
    slerp.SLERP,
    dare.DARE,
    resta.RESTA,
    safelora.SAFELORA,
    stableun.STABLEUN,
    restoration.ASCENT,
    restoration.REALIGNMENT,
    restoration.RESTORATION,
    qrealign.W8A8,
    qrealign.W4,
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
OURS = restoration.RESTORATION.name
BEFORE, GOAL = reference.UNDEFENDED.name, reference.ALIGNED.name
