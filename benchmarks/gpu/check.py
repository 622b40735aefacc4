"""What reading cannot tell of a GPU, in two calls of a few minutes each.

    python benchmarks/gpu/check.py one --out FOLDER    # kernels, products, memory and times; no model file
    python benchmarks/gpu/check.py two --out FOLDER    # SmolLM2: GPU against CPU, a fine-tune, the door, lesson 05

Each writes FOLDER/one.json or two.json after every check. With ``--device cpu --quick`` all runs small on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from benchmarks.curvature.setups import smollm2
from benchmarks.gpu.record import Record, Values, milliseconds, peak
from benchmarks.gpu.shapes import SHAPES, chats, reserved
from curvlib import cli, models, nf4, stages
from curvlib.batches import answer_loss
from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.curvature.inverse import fit
from curvlib.curvature.memory import forecast_memory
from curvlib.curvature.operator import asymmetry
from curvlib.facts import load_facts, trained_chats
from curvlib.generate import decode_batch, evaluating
from curvlib.parameters import tensor_list, trainable
from curvlib.report import ROOT
from curvlib.stages import FineTune
from curvlib.tiers import get_tier
from tests import cases
from tests.notebook_cases import executed


def kernels(device: str, shape: tuple[int, int]) -> Values:
    """The 4-bit map and its transpose against float64, relative errors."""
    parent, values = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)), Values()
    cases.quantise(parent)
    layer: Any = parent.to(device)[0]
    exact = nf4.dequantise(layer).double()
    for dtype in (torch.float32, torch.bfloat16):
        x, u = (cases.random(7, size).to(device, dtype) for size in reversed(shape))
        there = nf4.transposable_matmul(x, layer), x.double() @ exact.T
        back = nf4.transposable_matmul(u, layer, True), u.double() @ exact
        values[str(dtype)[6:]] = max(cases.relative_error(*pair) for pair in (there, back))
    return values


def products(device: str, dtype: torch.dtype) -> Values:
    """Hessian and Gauss-Newton products of a tiny 4-bit model against its float64 twin, relative errors."""
    model, batches = cases.nf4_llama(device=device), cases.batches()
    twin = cases.Twin(model)
    for layer in nf4.four_bit_layers(model).values():
        layer.compute_dtype = dtype
    v, values = cases.random(sum(p.numel() for p in trainable(model).values())).to(device), Values()
    for name, make in {"Hessian": hessian, "Gauss-Newton": ggn}.items():
        ours: Any = make(model, batches, check=False)
        exact: Any = make(twin, batches, tensor_list(trainable(twin)), check=False)
        values[name] = cases.relative_error(ours.matvec(v.float()), exact.matvec(v))
        values[f"{name}, asymmetry"] = asymmetry(ours)
    return values | {"worst": max(values["Hessian"], values["Gauss-Newton"])}


def slope(model: Any, batch: Any, targets: list[Any]) -> object:
    """Return the gradient of the mean answer loss."""
    return flat_gradient(answer_loss(model, batch), targets)


def costs(model: Any, device: str, rows: int, length: int) -> Values:
    """Milliseconds and GB of a gradient and two products, and the GB that were forecast."""
    batch, values = chats(rows, length).to(device), Values()
    targets = tensor_list(trainable(model))
    v = torch.randn(sum(target.numel() for target in targets)).to(device)
    makers: dict[str, Any] = {"gradient": None, "Gauss-Newton": ggn, "Hessian": hessian}
    for name, make in makers.items():
        work = partial(make(model, [batch], check=False).matvec, v) if make else partial(slope, model, batch, targets)
        values[f"{name}, ms"] = milliseconds(work, device)
        values[f"{name}, GB"] = round(peak(work, device), 6)
        values[f"{name}, GB forecast"] = round(forecast_memory(model, make or "gradient", batch).peak / 1e9, 6)
    gaps = [abs(values[f"{name}, GB forecast"] / values[f"{name}, GB"] - 1) for name in makers]
    return values | {"off": max(gaps)}


def fits(model: Any, device: str, length: int) -> Values:
    """GB and seconds of what restoration fits to 16 chats, and milliseconds of a solve with it."""
    batches, values = [chats(2, length).to(device) for _ in range(8)], Values()
    for name in ("fisher", "ekfac"):
        made, begin = list[Any](), time.monotonic()
        values[f"{name}, GB"] = peak(lambda made=made, name=name: made.append(fit(name, model, batches)), device)
        values[f"{name}, s"] = round(time.monotonic() - begin, 1)
        solve = partial(made[0].inverse(made[0].unit), torch.randn(made[0].operator.size).to(device))
        values[f"{name}, ms a solve"] = milliseconds(solve, device)
    return values


def decoding(model: Any, device: str, rows: int) -> Values:
    """Milliseconds of 8 new tokens in float32 and in bfloat16 products."""
    batch, values = chats(rows, 64).to(device), Values()
    work = partial(decode_batch, model, batch.input_ids, batch.attention_mask, [2], 8)
    for name, mode in {"float32": nullcontext(), "bfloat16": nf4.bfloat16_products(model)}.items():
        with evaluating(model), mode:
            values[f"{name}, ms"] = milliseconds(work, device, 0 if device == "cpu" else 2)
    return values


def across(device: str) -> Values:
    """The same product of SmolLM2 on the CPU and on the device, float32: what the device alone changes."""
    made: dict[str, list[Any]] = {"Hessian": [], "Gauss-Newton": []}
    for place in ("cpu", device):
        setup = smollm2(place, layers=4)
        for name, make in {"Hessian": hessian, "Gauss-Newton": ggn}.items():
            made[name].append(make(setup.model, [setup.batch(2, 48)], check=False).matvec(setup.vector()))
    values = {name: cases.relative_error(there, here) for name, (here, there) in made.items()}
    return values | {"worst": max(values.values())}


def door(device: str, tier: str, out: Path, *more: str) -> Values:
    """The user's door on SmolLM2's fine-tune on facts: exit status, seconds, outcomes."""
    size, begin = get_tier(tier), time.monotonic()
    adapter, folder = stages.fine_tuned(size, FineTune(task="facts", poison=0.1)), out / "restored"
    tuned = time.monotonic() - begin
    task = out / "task.jsonl"
    lines = [json.dumps({"messages": chat}) for chat in trained_chats(load_facts(size.facts))]
    task.write_text("\n".join(lines), "utf-8")
    options = {"base": stages.aligned_source(size), "adapter": adapter, "task": task, "out": folder, "device": device}
    status = cli.main(["restore", *(f"--{name}={value}" for name, value in options.items()), *more])
    told = folder / "restoration.json"
    outcomes = json.loads(told.read_text("utf-8"))["outcomes"] if told.exists() else {}
    spent = {"fine-tune, s": round(tuned, 1), "door, s": round(time.monotonic() - begin - tuned, 1)}
    return {"exit": status, **spent, "outcomes": outcomes}


def lesson(name: str, tier: str, out: Path) -> Values:
    """A lesson's code cells in this process, which needs no Jupyter: its claims."""
    results = executed(ROOT / "notebooks" / f"{name}.ipynb", tier=tier, output_dir=str(out))["results"]
    return {"claims": [str(claim) for claim in results.claims.values()]}


def call_one(record: Record, device: str, quick: bool) -> None:
    """Kernels and products, then a model of 8 B with random weights."""
    record.check("kernels", partial(kernels, device, (192, 64) if quick else (11_008, 4096)), float32=1e-5)
    record.check("float32 products", partial(products, device, torch.float32), worst=1e-4)
    record.check("bfloat16 products", partial(products, device, torch.bfloat16))
    name, layers = ("SmolLM2-135M", 2) if quick else ("Llama-3.1-8B", SHAPES["Llama-3.1-8B"][1][3])
    built: list[Any] = []
    record.check("build", lambda: built.append(reserved(name, layers, device, values=True)) or {"model": name})
    rows, length = (2, 40) if quick else (8, 128)
    for count in {rows, 2}:
        record.check(f"costs, {count} chats", lambda count=count: costs(built[0], device, count, length), off=0.1)
    record.check("fits", lambda: fits(built[0], device, length))
    record.check("decoding", lambda: decoding(built[0], device, rows))


def call_two(record: Record, device: str, quick: bool) -> None:
    """SmolLM2 at the tier of the device: against the CPU, through the door, through lesson 05."""
    tier, out = "ci" if quick else "gpu", record.path.parent
    record.check("device against CPU", partial(across, device), worst=1e-4)
    record.check("door", partial(door, device, tier, out, *["--dry-run"] * quick), exit=0)
    if not quick:
        record.check("lesson", partial(lesson, "05_second_order_restoration", tier, out))


def main() -> int:
    """Run one call and return 0 if every check was good."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("call", choices=("one", "two"))
    options.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--quick", action="store_true", help="small sizes, as on a CPU")
    options.add_argument("--seconds", type=float, help="no check begins after these; default: 170 or 320")
    given = options.parse_args()
    models.choose_device(given.device)  # one line where there is no GPU
    record = Record(given.out / f"{given.call}.json", given.seconds or (170 if given.call == "one" else 320))
    (call_one if given.call == "one" else call_two)(record, given.device, given.quick)
    return int(not all(row["good"] for row in record.checks))


if __name__ == "__main__":
    sys.exit(main())
