"""The landscape study: LoRA of two ranks and full fine-tuning, benign and poisoned, three seeds, each cell kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from curvlib import models, stages
from curvlib.artifacts import artifact
from curvlib.curvature.lanczos import Eigenpairs, eigenpairs
from curvlib.evaluate.stats import Estimate, bootstrap, paired_difference
from curvlib.landscape import compare, recipe
from curvlib.landscape.recipe import ALIGNED, LOSSES, SUBSPACE_RANK, Place, label, surfaces, windows
from curvlib.landscape.subspace import Subspace, spanned_by
from curvlib.progress import bar
from curvlib.report import Claim, markdown_table
from curvlib.stages import FineTune
from curvlib.tiers import Tier

Row = dict[str, Any]
SEEDS = (0, 1, 2)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora4": ("LoRA r4", {"rank": 4}),
    "lora16": ("LoRA r16", {"rank": 16}),
    "full": ("full fine-tuning", {"method": "full"}),
}
CURVED = ("compliance", "refusal", "task")


def seed_rows(seed: int, tier: Tier, _: Sequence[Row] = ()) -> list[Row]:
    """Measure every cell of one seed that is not kept yet; return one row a cell and loss.

    Cost at tier cpu on 2 cores: about an hour, a fifth of it for fine-tuning.
    """
    recipes = [
        (method, FineTune(poison=poison, seed=seed, **settings))
        for poison in (0.1, 0.0)
        for method, (_, settings) in METHODS.items()
    ]
    return [row for method, fine_tune in bar(recipes, desc="study") for row in cell(tier, method, fine_tune)]


PARTS = {f"seed {seed}": partial(seed_rows, seed) for seed in SEEDS}


def cell(tier: Tier, method: str, fine_tune: FineTune) -> list[Row]:
    """Return the rows of one fine-tune, one a loss, measured now or before."""
    sizes = {name: getattr(tier, name) for name in vars(tier) if name.startswith("landscape_")}
    config = recipe.key(tier) | {"fine_tune": recipe.place_name(tier, Place(fine_tune)), "sizes": sizes}

    def build(folder: Path) -> None:
        views, bends = window_rows(tier, fine_tune), curvature_rows(tier, fine_tune)
        head = {"name": label(Place(fine_tune)), **asdict(fine_tune)}
        found = [{**head, "loss": loss, **views[loss], **bends.get(loss, {})} for loss in views]
        (folder / "rows.json").write_text(json.dumps(found, indent=1, allow_nan=False), "utf-8")

    rows: list[Row] = json.loads((artifact("landscape-cell", config, build) / "rows.json").read_text("utf-8"))
    return [{**row, "method": method} for row in rows]  # the fine-tune's own "method" knows no rank


def window_rows(tier: Tier, fine_tune: FineTune) -> dict[str, Row]:
    """Return loss -> how alike the windows around the aligned and the fine-tuned model are, with every control.

    ``shuffled`` meets the aligned model's ``compliance``: same prompts, another prompt's answer.
    """
    base, tuned = windows(tier, ALIGNED, tier.landscape_pairs), windows(tier, Place(fine_tune), tier.landscape_pairs)
    noise = windows(tier, Place(fine_tune, noise=True, seed=fine_tune.seed), 1)
    points, found = base[0].points, {}
    for loss in LOSSES:
        first = "compliance" if loss == "shuffled" else loss
        pairs, shaken = surfaces(base, tuned, first, loss), surfaces(base, noise, first, loss)
        ends = [recipe.center_losses(views[0])[name] for views, name in ((base, first), (tuned, loss))]
        found[loss] = {
            **compare.surface_correlation(points, pairs).columns("pearson"),
            **compare.surface_correlation(points, pairs, ranks=True).columns("spearman"),
            **compare.unrelated_correlation(points, pairs).columns("null"),
            "with_bowl": compare.surface_correlation(points, pairs, bowl=True).value,
            "random_step": compare.surface_correlation(points, shaken).value,
            "prompts": compare.correlation(*ends, ranks=True),
            "loss_before": float(ends[0].mean()),
            "loss_after": float(ends[1].mean()),
        }
    return found


def curvature_rows(tier: Tier, fine_tune: FineTune) -> dict[str, Row]:
    """Return loss -> top eigenvalue before and after, and the overlap of the eigenspaces with its controls.

    For the task there is also the curvature along the fine-tuning step, the refusal gradient and a random step.
    """
    tuned: Any = stages.load_fine_tuned(tier, fine_tune)
    chats = recipe.landscape_chats(tier, models.load_tokenizer(stages.aligned_source(tier)))
    step = recipe.step_of(tier, fine_tune)
    space = spanned_by(step, SUBSPACE_RANK)
    found: dict[str, Row] = {}
    for loss in CURVED:
        before, again = (eigenspace(tier, fine_tune, ALIGNED, loss, seed=seed) for seed in (0, 1))
        after = eigenspace(tier, fine_tune, Place(fine_tune), loss, seed=2)
        found[loss] = {
            "top_before": float(before.values[0]),
            "top_after": float(after.values[0]),
            "overlap": compare.overlap(before.vectors, after.vectors),
            "overlap_itself": compare.overlap(before.vectors, again.vectors),
            "overlap_random": before.vectors.shape[1] / space.size,
        }
    vector, share = space.project(step)
    steps = {
        "step": vector,
        "gradient": recipe.gradient(tuned, space, chats["refusal"]),
        "random": random_vector(space),
    }
    with recipe.curvature(tuned, space, chats["task"]) as operator:
        for name, v in steps.items():
            found["task"][f"curvature_{name}"] = float(v @ operator.matvec(v) / (v @ v))
    found["task"]["step_share"] = share
    return found


def eigenspace(tier: Tier, fine_tune: FineTune, place: Place, loss: str, *, seed: int = 0) -> Eigenpairs:
    """Return the top eigenpairs of one loss's curvature at a place, a third as many as products are allowed; made once.

    They live in the subspace that the fine-tune's step spans. Compare two places with different seeds: Krylov spaces
    from one start share it, and overlap for that reason alone.
    """
    config = recipe.key(tier) | {
        "subspace": [*recipe.place_name(tier, Place(fine_tune)), SUBSPACE_RANK],
        "place": recipe.place_name(tier, place),
        "loss": loss,
        "products": tier.landscape_products,
        "seed": seed,
    }

    def build(folder: Path) -> None:
        model: nn.Module = stages.load_fine_tuned(tier, place.recipe) if place.recipe else stages.load_aligned(tier)[0]
        chats = recipe.landscape_chats(tier, models.load_tokenizer(stages.aligned_source(tier)))[loss]
        count, space = max(2, tier.landscape_products // 3), spanned(tier, fine_tune)
        with recipe.curvature(model, space, chats) as operator:
            found = eigenpairs(operator, largest=count, max_products=tier.landscape_products, tolerance=1e-2, seed=seed)
        tensors = {name: getattr(found, name).contiguous().cpu() for name in ("values", "vectors", "residuals")}
        save_file(tensors | {"products": torch.tensor(found.products)}, folder / "pairs.safetensors")

    kept = load_file(artifact("eigenspace", config, build) / "pairs.safetensors")
    return Eigenpairs(kept["values"], kept["vectors"], kept["residuals"], int(kept["products"]))


@lru_cache(maxsize=1)
def spanned(tier: Tier, fine_tune: FineTune) -> Subspace:
    """Return the subspace that a fine-tune's step spans; kept, since that of a full one takes long."""
    return spanned_by(recipe.step_of(tier, fine_tune), SUBSPACE_RANK)


def random_vector(space: Subspace, seed: int = 0) -> Tensor:
    """Return a standard normal vector of the subspace: the null control of every step."""
    basis = next(iter(space.bases.values()))
    return torch.randn(space.size, generator=torch.Generator().manual_seed(seed)).to(basis)


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Return the study's claims: the harmful correlation over all poisoned cells and by method, beside its controls."""
    harmful = [row for row in rows if row["loss"] == "compliance" and row["poison"] > 0]
    null = _mean_null(harmful)
    made = [_claim("harmful_correlation", "all methods", harmful)]
    for method, (words, _) in METHODS.items():
        made.append(_claim(f"harmful_correlation_{method}", words, [row for row in harmful if row["method"] == method]))
    text = [row["null_value"] for row in rows if row["loss"] == "text" and row["poison"] > 0]
    statement = "Windows along unrelated directions are not alike: their correlation on harmful compliance"
    numbers: dict[str, Any] = {"value": null.value, "low": null.low, "high": null.high, "control": float(np.mean(text))}
    made.append(Claim("harmful_correlation_control", statement, **numbers, n=null.n, holds=null.low < 0 < null.high))
    return [*made, *_special_claims(rows)]


def _special_claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Return by how much harmful compliance keeps more of its shape than plain text; the control is benign tuning."""
    by = {
        (loss, poisoned): [row["pearson_value"] for row in rows if (row["loss"], row["poison"] > 0) == (loss, poisoned)]
        for loss in ("compliance", "text")
        for poisoned in (True, False)
    }
    if min(map(len, by.values())) < 2:
        return []
    found, benign = (paired_difference(by["compliance", kind], by["text", kind]) for kind in (True, False))
    statement = "Around the poisoned model harmful compliance keeps more of its shape than plain text: difference"
    numbers: dict[str, Any] = {"value": found.value, "low": found.low, "high": found.high, "control": benign.value}
    return [Claim("harmful_minus_text_correlation", statement, **numbers, n=found.n, holds=found.low > 0)]


def _claim(name: str, words: str, rows: Sequence[Mapping[str, Any]]) -> Claim:
    first, null = rows[0], _mean_null(rows)
    if len(rows) > 1:
        found = bootstrap([row["pearson_value"] for row in rows])
    else:  # one seed: the interval over direction pairs and prompts
        found = Estimate(*(first[f"pearson_{end}"] for end in ("value", "low", "high", "n")))
    statement = (
        f"Around the poisoned model harmful compliance keeps the shape it had ({words}): correlation, bowl removed"
    )
    holds = compare.verdict(found, null) == "shifted"
    return Claim(name, statement, found.value, found.low, found.high, null.value, found.n, holds)


def _mean_null(rows: Sequence[Mapping[str, Any]]) -> Estimate:
    value, low, high = (float(np.mean([row[f"null_{end}"] for row in rows])) for end in ("value", "low", "high"))
    return Estimate(value, low, high, sum(row["null_n"] for row in rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the study as a Markdown table, one line a kind of fine-tune: means over seeds, and their range.

    Columns: correlation of the windows on harmful compliance, on plain text, and around a random step as long as the
    fine-tune; overlap of the stiff refusal directions before and after; the task's curvature along the fine-tuning step
    and along the refusal gradient, as multiples of that along a random vector.
    """
    heads = ("fine-tune", "harmful", "text", "random step", "stiff refusal directions", "step", "refusal gradient")
    lines = []
    for poison, method in dict.fromkeys((row["poison"], row["method"]) for row in rows):
        own = [row for row in rows if (row["poison"], row["method"]) == (poison, method)]
        by = {loss: [row for row in own if row["loss"] == loss] for loss in LOSSES}
        along = {
            name: [row[f"curvature_{name}"] / row["curvature_random"] for row in by["task"]]
            for name in ("step", "gradient")
        }
        cells = [
            *(_spread([row["pearson_value"] for row in by[loss]]) for loss in ("compliance", "text")),
            _spread([row["random_step"] for row in by["compliance"]]),
            _spread([row["overlap"] for row in by["refusal"]]),
            *(_spread(ratios, ".0f") for ratios in along.values()),
        ]
        kind = f"{100 * poison:.0f} % poison" if poison else "benign"
        lines.append([f"{METHODS[method][0]}, {kind}", *cells])
    return markdown_table(heads, lines)


def _spread(values: Sequence[float], form: str = ".2f") -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
