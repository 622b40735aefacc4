"""What the influence study claims, from its committed rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from curvlib.evaluate.stats import Estimate, bootstrap, over_seeds
from curvlib.influence.recipe import BASELINES, DIRECT
from curvlib.influence.scores import METHODS
from curvlib.report import Claim

Row = dict[str, Any]


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Return the claims of the parts that are there; each follows from the rows alone."""
    by = {part: [row for row in rows if row["part"] == part] for part in _CLAIMS}
    return [claim for part, own in by.items() if own for claim in _CLAIMS[part](own)]


def _convex_claims(convex: Sequence[Row]) -> list[Claim]:
    found = bootstrap([row["spearman"] for row in convex])
    control = float(np.mean([row["control"] for row in convex]))
    statement = "Influence orders exact leave-one-out effects in ridge regression, rank correlation of at least 0.95"
    return [_claim("loo_spearman_convex", statement, found, control, found.value >= 0.95)]


def _transformer_claims(rows: Sequence[Row]) -> list[Claim]:
    names = dict.fromkeys(row["method"] for row in rows)
    by_method = {name: [row["spearman"] for row in rows if row["method"] == name] for name in names}
    best = max((name for name in by_method if name in METHODS), key=lambda name: float(np.mean(by_method[name])))
    found = bootstrap(by_method[best])
    statement = f"The best inverse ({best}) orders leave-one-out effects in a tiny transformer, rank correlation"
    control = float(np.mean(by_method["identity"]))
    return [_claim("loo_spearman_transformer", statement, found, control, found.value >= 0.9)]


def _datamodeling_claims(scored: Sequence[Row]) -> list[Claim]:
    baselines = [row for row in scored if row["label"] in BASELINES]
    # The damping rule was fixed before the retrainings, so the headline takes it, not the best of a sweep.
    ours = max((row for row in scored if row["label"] in DIRECT), key=lambda row: float(row["lds_value"]))
    other = max(baselines, key=lambda row: float(row["lds_value"]))
    null = next(row for row in baselines if row["method"] == "random")
    one, two = (Estimate(*(row[f"lds_{end}"] for end in ("value", "low", "high", "n"))) for row in (ours, other))
    statement = f"The influence of each chat ({ours['label']}) orders retrained models: linear datamodeling score"
    made = [_claim("lds", statement, one, float(null["lds_value"]), one.value > two.value)]
    statement = f"The best baseline at the end of training ({other['label']}) orders them less well: datamodeling score"
    made.append(_claim("lds_best_baseline", statement, two, float(null["lds_value"]), two.value < one.value))
    best = max((row for row in scored if row["label"] in METHODS), key=lambda row: float(row["mean_value"]))
    for head, words, row in (("gain", "query by query", ours), ("mean_gain", "on the mean query", best)):
        gain = Estimate(*(row[f"{head}_{end}"] for end in ("value", "low", "high", "n")))
        statement = f"Curvature ({row['label']}) orders them better than the dot product of gradients, {words}: by"
        made.append(_claim(f"lds_{head}", statement, gain, float(null[f"{head}_value"]), gain.low > 0))
    half, plain = (next(row for row in scored if row["label"] == f"{m}, half way") for m in ("fisher", "dot product"))
    gain = Estimate(*(half[f"gain_{end}"] for end in ("value", "low", "high", "n")))
    statement = "Influence (fisher) half way along the adapter orders them better than the dot product at its end: by"
    return [*made, _claim("lds_half_way_gain", statement, gain, float(plain["gain_value"]), gain.low > 0)]


def _removal_claims(rows: Sequence[Row]) -> list[Claim]:
    poisoned = [row for row in rows if row["poison"] > 0]
    by = {name: [row for row in poisoned if row["removed"] == name] for name in {row["removed"] for row in poisoned}}
    made = []
    for where, name, end in (("", "fisher", ""), (" half way along the adapter", "fisher, half way", "_half_way")):
        found = bootstrap([row["auroc_value"] for row in by[name]])
        control = float(np.mean([row["auroc_value"] for row in by["random"]]))
        statement = f"Influence{where} finds the poison: area under the ROC curve of at least 0.95"
        made.append(_claim(f"poison_auroc{end}", statement, found, control, found.value >= 0.95))
        gap, random_gap = (_gap(by[whose], by["clean fine-tune"]) for whose in (name, "random"))
        statement = f"Without the chats it ranks highest{where}, compliance is within 5 points of the clean fine-tune"
        made.append(_claim(f"removal_compliance_gap_points{end}", statement, gap, random_gap.value, gap.value <= 5))
    return made


def _gap(rows: Sequence[Row], clean: Sequence[Row]) -> Estimate:
    """Return by how many points compliance exceeds the clean fine-tune's, paired by seed and prompt."""
    by_seed = (sorted(group, key=lambda row: int(row["seed"])) for group in (rows, clean))
    points = ([[100.0 * flag for flag in row["verdicts"]] for row in group] for group in by_seed)
    return over_seeds(*points)


def _claim(name: str, statement: str, found: Estimate, control: float, holds: bool) -> Claim:
    return Claim(name, statement, found.value, found.low, found.high, control, found.n, holds)


_CLAIMS = {
    "convex": _convex_claims,
    "transformer": _transformer_claims,
    "datamodeling": _datamodeling_claims,
    "removal": _removal_claims,
}
