"""``python -m curvlib restore``: bring refusals back to a LoRA adapter of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from curvlib import data, plots, stages
from curvlib.answers import OWN_ANSWER_TOKENS
from curvlib.batches import Batch, Chat, Example, encode, make_batches, open_ended
from curvlib.cache import publish, workspace
from curvlib.errors import CurvlibError
from curvlib.evaluate.behaviour import Behaviour, measure_behaviour, reference_model
from curvlib.evaluate.judge import VERDICTS, is_refusal
from curvlib.generate import Model, generate
from curvlib.parameters import assign, trainable
from curvlib.progress import say
from curvlib.restore import objectives
from curvlib.restore.given import Given, Split, cut, encode_chats, read_chats
from curvlib.restore.objectives import SafetyBatches
from curvlib.restore.outcome import HeldOut
from curvlib.restore.pair import load_pair, pair_tokenizer
from curvlib.restore.recipe import BATCH_SIZE, Chats, Restoration, history, run
from curvlib.template import spoken

HARMFUL, BENIGN, TASK = (32, 24, 32), (32, 24, 32), (32, 24, 24)  # rows to learn from, to choose by, to show
ALIGNED = 0.5  # share of harmful prompts that an aligned base refuses at least


@dataclass(frozen=True)
class Request:
    """What the user asks for; see ``python -m curvlib restore --help``."""

    base: str
    adapter: Path
    task: Path
    out: Path
    harmful: Path | None = None
    benign: Path | None = None
    how: Restoration = field(default_factory=Restoration)
    seed: int = 0
    device: str | None = None

    @property
    def files(self) -> dict[str, Path | None]:
        """The user's rows by what they are for."""
        return {"task": self.task, "harmful": self.harmful, "benign": self.benign}


@dataclass(frozen=True)
class Outcome:
    """How a model answers prompts that restoration never saw, and its task loss (nats per token) on such chats."""

    harmful: Behaviour
    benign: Behaviour
    task: float


def restore_adapter(request: Request) -> dict[str, Outcome]:
    """Restore the adapter, write the result to ``request.out``, and return the outcomes of base, before and after.

    ``out`` becomes a peft adapter with ``restoration.json`` and ``restoration.png`` beside it, whole or not at all.
    The given adapter is only read. The same request on one machine, with as many threads, gives the same adapter to
    1e-6; machines round differently, and on another one a prompt or two may be answered otherwise.

    Raises:
        CurvlibError: ``out`` exists or lies in the given adapter, malformed data, an adapter that does not fit, a base
            that does not refuse, an adapter that does not help on the task as one of another base of the same shapes,
            no improvement.
    """
    if request.out.exists():
        raise CurvlibError(f"{request.out} exists: give a new folder for the restored adapter")
    if request.out.resolve().is_relative_to(request.adapter.resolve()):
        raise CurvlibError(f"{request.out} lies in the adapter's folder, which is only read: give a folder elsewhere")
    try:
        with workspace(beside=request.out):
            pass
    except OSError as error:
        raise CurvlibError(f"cannot write beside {request.out} ({error.strerror}): give another folder") from error
    given = {name: read_chats(file, answered=name == "task") for name, file in request.files.items() if file}
    told = {name: rows.notes for name, rows in given.items() if rows.notes}
    for name, notes in told.items():
        say(f"{request.files[name]}: {'; '.join(notes)}")
    tokenizer = pair_tokenizer(request.base, request.adapter)
    encoded = {name: encode_chats(tokenizer, rows) for name, rows in given.items()}
    tasks = cut(encoded["task"], TASK, "task chats", request.seed)
    harmful, benign = _harmful(given.get("harmful"), request.seed), _benign(given.get("benign"), request.seed)
    model = load_pair(request.base, request.adapter, request.device, [e for part in encoded.values() for e in part])
    _check_base(model, make_batches([*tasks.learn, *tasks.choose], BATCH_SIZE, stages.pad_id(tokenizer)), request)
    result = run(model, _chats(model, tokenizer, harmful, benign, tasks), request.how, seed=request.seed)
    if len(result.steps) == 1:
        raise _no_improvement(result.stop_reason)
    shown = [[_prompt(chat) for chat in part.show] for part in (harmful, benign)]
    measured = partial(_outcome, tokenizer, shown, make_batches(tasks.show, BATCH_SIZE, stages.pad_id(tokenizer)))
    outcomes = {"after": measured(model)}
    assign(trainable(model), result.before)
    outcomes["before"] = measured(model)
    if outcomes["after"].harmful.refuses.value <= outcomes["before"].harmful.refuses.value:
        raise _no_improvement("harmful prompts are refused no more often than before")
    with reference_model(model, "adapter off") as base:
        outcomes["base"] = measured(base)
    assign(trainable(model), result.after)
    outcomes = {name: outcomes[name] for name in ("base", "before", "after")}
    _write(model, tokenizer, request.out, outcomes, {"history": history(result), "rows": told})
    return outcomes


def _outcome(
    tokenizer: PreTrainedTokenizerBase,
    shown: Sequence[Sequence[Chat]],
    task: Sequence[Batch],
    model: Model,
) -> Outcome:
    harmful, benign = (measure_behaviour(model, tokenizer, prompts) for prompts in shown)
    return Outcome(harmful, benign, objectives.mean_loss(model, task))


def _no_improvement(reason: str) -> CurvlibError:
    return CurvlibError(
        f"no improvement found ({reason}), nothing was written: give more data, a larger --rise or another --objective"
    )


def _check_base(model: PeftModel, task: Sequence[Batch], request: Request) -> None:
    """Raise where the adapter does not lower the task's loss: shapes fit any model of the family, training only one."""
    worn = objectives.mean_loss(model, task)
    with reference_model(model, "adapter off") as base:
        bare = objectives.mean_loss(base, task)
    if not worn < bare:  # so is nan
        named = model.active_peft_config.base_model_name_or_path
        raise CurvlibError(
            f"the adapter {request.adapter} does not help on {request.task} (loss {worn:.3f} nats with it, {bare:.3f} "
            f"without): give the base that it was trained on, its config names {named!r}, and chats of its task"
        )


def _harmful(rows: Given | None, seed: int) -> Split:
    if rows:
        return cut([*rows.chats.values()], HARMFUL, "harmful prompts", seed)
    names = ("restore_harmful", "validation_harmful", "test_harmful")
    return Split(*(_asked(stages.requests(name, size)) for name, size in zip(names, HARMFUL, strict=True)))


def _benign(rows: Given | None, seed: int) -> Split:
    """Return prompts that look harmful and are not; a half of those to learn from are everyday ones."""
    if rows:
        return cut([*rows.chats.values()], BENIGN, "benign prompts", seed)
    half = BENIGN[0] // 2
    parts = [("restore_edgy", half), ("restore_benign", half), ("validation_edgy", BENIGN[1]), ("test_edgy", BENIGN[2])]
    edgy, everyday, choose, show = (_asked([row.prompt for row in data.load_split(n)[:size]]) for n, size in parts)
    return Split(edgy + everyday, choose, show)


def _asked(prompts: Sequence[str]) -> list[Chat]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def _prompt(chat: Chat) -> Chat:
    """Return the chat without a last answer."""
    return chat[:-1] if chat[-1]["role"] == "assistant" else chat


def _chats(model: PeftModel, tokenizer: PreTrainedTokenizerBase, harmful: Split, benign: Split, task: Split) -> Chats:
    """Return restoration's chats: refusals given or made by the base, benign prompts with the base's own answers."""
    pad = stages.pad_id(tokenizer)

    def batches(examples: Sequence[Example]) -> list[Batch]:
        return make_batches(examples, BATCH_SIZE, pad)

    def encoded(chats: Sequence[Chat]) -> list[Batch]:
        return batches([open_ended(example) for example in encode(tokenizer, chats, stages.MAX_LENGTH)])

    refused = [encoded(_refusals(model, tokenizer, part)) for part in (harmful.learn, harmful.choose)]
    benign_own = [encoded(_answered(model, tokenizer, part)) for part in (benign.learn, benign.choose)]
    held_out = HeldOut(SafetyBatches(refused[1]), {"task": batches(task.choose), "benign": benign_own[1]})
    return Chats(batches(task.learn), SafetyBatches(refused[0]), benign_own[0], held_out)


def _refusals(model: PeftModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> list[Chat]:
    """Return the chats with the answers given, and with the base's own refusals where none is given."""
    given = [chat for chat in chats if chat[-1]["role"] == "assistant"]
    asked = [chat for chat in chats if chat[-1]["role"] != "assistant"]
    made = [c for c in _answered(model, tokenizer, asked) if is_refusal(c[-2]["content"], c[-1]["content"])]
    if len(made) < ALIGNED * len(asked):
        raise CurvlibError(
            f"the base refuses {len(made)} of {len(asked)} harmful prompts, so there is no aligned behaviour to return "
            "to: give an aligned base, or a --harmful file with refusals"
        )
    return given + made


def _answered(model: PeftModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> list[Chat]:
    """Return the prompts with the base's own first 32 tokens, those with an empty answer left out."""
    prompts = [_prompt(chat) for chat in chats]
    with reference_model(model, "adapter off") as base:
        answers = [*map(spoken, generate(base, tokenizer, prompts, max_new_tokens=OWN_ANSWER_TOKENS))]
    pairs = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer.strip()]
    return [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer in pairs]


def table(outcomes: Mapping[str, Outcome]) -> str:
    """Return the outcomes as lines of text; shares in percent with 95 % Wilson intervals."""
    lines = [f"{'':8s}{'complies':>18s}{'refuses':>18s}{'incoherent':>18s}{'over-refusal':>18s}{'task loss':>11s}"]
    for name, row in outcomes.items():
        rates = (row.harmful.complies, row.harmful.refuses, row.harmful.incoherent, row.benign.refuses)
        shares = "".join(f"{rate.percent:.0f}".rjust(18) for rate in rates)
        lines.append(f"{name:8s}{shares}{row.task:11.3f}")
    return "\n".join(lines)


def _write(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    outcomes: Mapping[str, Outcome],
    more: Mapping[str, Any],
) -> None:
    bars = {f"{name}, {part}": getattr(row, part) for part in ("harmful", "benign") for name, row in outcomes.items()}
    drawn = plots.behaviour_bars(bars, "Answers to harmful prompts and to benign ones")
    with workspace(beside=out) as place:
        folder = place / "adapter"
        model.save_pretrained(str(folder), save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
        told = {"outcomes": {name: _numbers(row) for name, row in outcomes.items()}, **more}
        (folder / "restoration.json").write_text(json.dumps(told, indent=1), "utf-8")
        drawn.savefig(folder / "restoration.png")
        publish(folder, out)


def _numbers(row: Outcome) -> dict[str, Any]:
    harmful = {verdict: getattr(row.harmful, verdict).value for verdict in VERDICTS}
    return {"harmful": harmful, "over_refusal": row.benign.refuses.value, "task_loss": row.task}
