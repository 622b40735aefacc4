"""Every method by name, in the order of tables and figures: to add one is one line here."""

from __future__ import annotations

from importlib import import_module

from curvlib.defenses.method import Method
from curvlib.defenses.reference import ALIGNED, UNDEFENDED
from curvlib.defenses.restoration import RESTORATION

PLACES = (  # file of this package and name in it
    "reference.UNDEFENDED",
    "reference.ALIGNED",
    "ema.EMA",
    "lookahead.REAL",
    "lookahead.VIRTUAL",
    "panacea.PANACEA",
    "mixture.MIXTURE",
    "lox.LOX",
    "linear.LINEAR",
    "slerp.SLERP",
    "dare.DARE",
    "resta.RESTA",
    "safelora.SAFELORA",
    "antidote.ANTIDOTE",
    "stableun.STABLEUN",
    "restoration.ASCENT",
    "restoration.REALIGNMENT",
    "restoration.RESTORATION",
    "qrealign.W8A8",
    "qrealign.W4",
)
_ALL: list[Method] = [
    getattr(import_module(f"curvlib.defenses.{file}"), name) for file, name in (place.split(".") for place in PLACES)
]
METHODS = {method.name: method for method in _ALL}
OURS, BEFORE, GOAL = RESTORATION.name, UNDEFENDED.name, ALIGNED.name
