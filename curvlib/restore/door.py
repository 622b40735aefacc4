"""``python -m curvlib restore``: bring refusals back to a LoRA adapter of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from time import perf_counter

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from curvlib import data, stages
from curvlib.answers import OWN_ANSWER_TOKENS
from curvlib.batches import Batch, Chat, Example, encode, make_batches, open_ended
from curvlib.cache import workspace
from curvlib.curvature.memory import forecast_memory
from curvlib.errors import CurvlibError
from curvlib.evaluate.behaviour import measure_behaviour, reference_model
from curvlib.evaluate.judge import is_refusal
from curvlib.evaluate.log_odds import safety_log_odds
from curvlib.generate import Model, generate
from curvlib.parameters import assign, trainable
from curvlib.progress import say
from curvlib.restore import objectives
from curvlib.restore.card import Outcome, report, write
from curvlib.restore.given import Given, Split, cut, encode_chats, read_chats
from curvlib.restore.objectives import Margin, SafetyBatches
from curvlib.restore.outcome import HeldOut, RestorationResult
from curvlib.restore.pair import adapter_folder, load_pair, pair_tokenizer
from curvlib.restore.recipe import BATCH_SIZE, Chats, Restoration, history, run
from curvlib.restore.stress import relearned
from curvlib.template import spoken

SIZES = (32, 24, 32)  # most rows of each kind to learn from, to choose by, to show
ODDS = 8  # shown prompts whose safety log-odds are measured
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
    depth: float | None = None
    stress: bool = False
    seed: int = 0
    device: str | None = None
    dry_run: bool = False


def restore_adapter(request: Request) -> str:
    """Restore the adapter, write the result to ``request.out``, and return the report; a dry run returns the plan.

    ``out`` becomes a peft adapter with ``restoration.json``, ``restoration.png`` and the report as its card, whole or
    not at all. The given adapter is only read. The same request on one machine gives the same adapter to 1e-6.

    Raises:
        CurvlibError: ``out`` exists or cannot be written, malformed data, an adapter that does not fit, a base that
            does not refuse, an adapter that does not help on the task as one of another base of the same shapes does,
            no improvement.
    """
    _check_out(request)
    request = replace(request, adapter=adapter_folder(request.adapter))
    files = {"task": request.task, "harmful": request.harmful, "benign": request.benign}
    given = {name: read_chats(file, answered=name == "task") for name, file in files.items() if file}
    notes = {name: rows.notes for name, rows in given.items() if rows.notes}
    for name, lines in notes.items():
        say(f"{files[name]}: {'; '.join(lines)}")
    tokenizer = pair_tokenizer(request.base, request.adapter)
    encoded = {name: encode_chats(tokenizer, rows) for name, rows in given.items()}
    splits = {"task": cut(encoded["task"], SIZES, "task chats", request.seed)}
    splits |= {name: _prompts(name, given.get(name), request.seed) for name in ("harmful", "benign")}
    model = load_pair(request.base, request.adapter, request.device, [e for part in encoded.values() for e in part])
    batches = partial(make_batches, batch_size=BATCH_SIZE, pad_id=stages.pad_id(tokenizer), device=model.device)
    task = Split(*(batches(part) for part in (splits["task"].learn, splits["task"].choose, splits["task"].show)))
    plan = _plan(model, splits, task.learn)
    if request.dry_run:
        return plan
    say(plan)
    _check_base(model, [*task.learn, *task.choose], request)
    how = request.how if request.depth is None else replace(request.how, objective="margin")
    result = run(model, _chats(model, tokenizer, splits, task, request.depth), how, seed=request.seed)
    if result.path[0].loss <= result.goal:
        raise CurvlibError(f"{_safety(request, result)}: there is nothing to restore")
    if len(result.path) == 1:
        raise _no_improvement(result.stop_reason)
    outcomes = _outcomes(model, tokenizer, splits, task.show, result)
    _check_refusals(outcomes, request.depth)
    text = report(outcomes, result, _safety(request, result))
    if request.stress:
        unseen = splits["harmful"].choose, splits["harmful"].show
        text += "\n" + relearned(model, tokenizer, *([*map(_prompt, part)] for part in unseen), seed=request.seed)
        assign(trainable(model), result.after)
    write(model, tokenizer, request.out, text, outcomes, {"history": history(result), "rows": notes})
    return text


def _check_out(request: Request) -> None:
    if request.out.exists():
        raise CurvlibError(f"{request.out} exists: give a new folder for the restored adapter")
    if request.out.resolve().is_relative_to(request.adapter.resolve()):
        raise CurvlibError(f"{request.out} lies in the adapter's folder, which is only read: give a folder elsewhere")
    if not 0 < request.how.way <= 1:
        raise CurvlibError(f"strength {request.how.way} was given, expected more than 0 and at most 1: 0.7 is usual")
    if request.depth is not None and not (0 < request.depth < inf and request.how.objective == "refusal"):
        given = f"depth {request.depth} with objective {request.how.objective!r} was given"
        raise CurvlibError(f"{given}, expected nats above 0 without an --objective: 4 is usual")
    try:
        with workspace(beside=request.out):
            pass
    except OSError as error:
        raise CurvlibError(f"cannot write beside {request.out} ({error.strerror}): give another folder") from error


def _safety(request: Request, result: RestorationResult) -> str:
    """Say how safe held-out chats were, are, and should be: log-odds of refusing, or how far they are from the base."""
    losses, depth = (result.path[0].loss, result.path[-1].loss, result.goal), request.depth or 0.0
    if request.how.objective == "distill":
        start, end, goal = (f"{loss:.3f}" for loss in losses)
        return f"held-out divergence from the base {start} → {end} nats a token, {goal} asked for"
    start, end, goal = (f"{depth - loss:.1f}" for loss in losses)
    return f"held-out mean log-odds of refusing {start} → {end} nats, {goal} asked for"


def _no_improvement(reason: str) -> CurvlibError:
    return CurvlibError(
        f"no improvement found ({reason}), nothing was written: give more data, a larger --limit or another --objective"
    )


def _check_refusals(outcomes: Mapping[str, Outcome], depth: float | None) -> None:
    """Raise where refusals did not come back; those that are there may only have become deeper."""
    before, after = (outcomes[name].harmful.refuses.value for name in ("before", "after"))
    if after < before or (after == before and depth is None):
        raise _no_improvement("harmful prompts are refused no more often than before")


def _check_base(model: PeftModel, task: Sequence[Batch], request: Request) -> None:
    """Raise where the adapter does not lower the task's loss: shapes fit any model of the family, training only one."""
    tuned = objectives.mean_loss(model, task)
    with reference_model(model, "adapter off") as base:
        bare = objectives.mean_loss(base, task)
    if not tuned < bare:  # so is nan
        named = model.active_peft_config.base_model_name_or_path
        raise CurvlibError(
            f"the adapter {request.adapter} does not help on {request.task} (loss {tuned:.3f} nats with it, {bare:.3f} "
            f"without): give the base that it was trained on, its config names {named!r}, and chats of its task"
        )


def _prompts(name: str, rows: Given | None, seed: int) -> Split:
    """Return the user's harmful or benign prompts, or our own; a half of our benign ones to learn from is everyday."""
    if rows:
        return cut([*rows.chats.values()], SIZES, f"{name} prompts", seed)
    parts = []
    for split, size in zip(("restore", "validation", "test"), SIZES, strict=True):
        if name == "harmful":
            texts = stages.requests(f"{split}_harmful", size)
        else:
            kinds = {"edgy": size // 2, "benign": size - size // 2} if split == "restore" else {"edgy": size}
            texts = [text for kind, few in kinds.items() for text in data.prompts(f"{split}_{kind}", few)]
        parts.append([[{"role": "user", "content": text}] for text in texts])
    return Split(*parts)


def _plan(model: PeftModel, splits: Mapping[str, Split], task: Sequence[Batch]) -> str:
    """Return rows, parameters, memory and time in words; the time comes from one gradient of a batch."""
    lines = [f"{'rows':12}{'to learn':>10}{'to choose':>10}{'to show':>10}"]
    sizes = {name: (len(part.learn), len(part.choose), len(part.show)) for name, part in splits.items()}
    lines += [f"{name:12}" + "".join(f"{size:10}" for size in row) for name, row in sizes.items()]
    adapted, widest = list(trainable(model).values()), max(task, key=lambda batch: batch.input_ids.numel())
    count = sum(parameter.numel() for parameter in adapted)
    lines.append(f"parameters  {count:,} of the adapter, beside {sum(p.numel() for p in model.parameters()):,} stored")
    stay = sizes["task"][0] + sizes["benign"][0]
    try:
        gradient = forecast_memory(model, "gradient", widest).total
        memory = f"some {(gradient + 4 * count * (stay + 10)) / 2**30:.1f} GiB"  # a row a chat, and some vectors
    except CurvlibError as error:
        memory = f"not known: {error}"
    began = perf_counter()
    objectives.gradient(model, [objectives.Term([widest])], adapted)
    chat = (perf_counter() - began) / len(widest)
    prompts = sizes["harmful"], sizes["benign"]
    answers = sum(learn + choose + 3 * show for learn, choose, show in prompts)
    chats = 5 * (sizes["harmful"][0] + stay) + 3 * sum(row[1] for row in sizes.values()) + 2 * answers
    lines.append(f"memory      {memory}")
    lines.append(f"time        some {chat * chats / 60:.0f} minutes, by one gradient of {len(widest)} chats")
    return "\n".join(lines)


def _prompt(chat: Chat) -> Chat:
    """Return the chat without a last answer."""
    return chat[:-1] if chat[-1]["role"] == "assistant" else chat


def _chats(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Split],
    task: Split,
    depth: float | None,
) -> Chats:
    """Return restoration's chats: refusals given or made by the base, benign prompts with the base's own answers."""

    def encoded(chats: Sequence[Chat]) -> list[Batch]:
        examples: list[Example] = encode(tokenizer, chats, stages.MAX_LENGTH)
        return make_batches([*map(open_ended, examples)], BATCH_SIZE, stages.pad_id(tokenizer), model.device)

    def safety(part: Sequence[Chat]) -> SafetyBatches:
        refusals = encoded(_refusals(model, tokenizer, part))
        return SafetyBatches(refusals, margin=Margin.of(tokenizer, refusals, depth or 0.0))

    harmful, benign = splits["harmful"], splits["benign"]
    refused = [safety(part) for part in (harmful.learn, harmful.choose)]
    answered = [encoded(_answered(model, tokenizer, part)) for part in (benign.learn, benign.choose)]
    held_out = HeldOut(refused[1], {"task": task.choose, "benign": answered[1]})
    return Chats(task.learn, refused[0], answered[0], held_out)


def _refusals(model: PeftModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> list[Chat]:
    """Return the chats with the answers given, and with the base's own refusals where none is given."""
    asked = [chat for chat in chats if chat[-1]["role"] != "assistant"]
    made = [c for c in _answered(model, tokenizer, asked) if is_refusal(c[-2]["content"], c[-1]["content"])]
    if len(made) < ALIGNED * len(asked):
        raise CurvlibError(
            f"the base refuses {len(made)} of {len(asked)} harmful prompts in the adapter's chat template, so there is "
            "no aligned behaviour to return to: give an aligned base, or a --harmful file with refusals"
        )
    return [chat for chat in chats if chat[-1]["role"] == "assistant"] + made


def _answered(model: PeftModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> list[Chat]:
    """Return the prompts with the base's own first 32 tokens, those with an empty answer left out."""
    prompts = [_prompt(chat) for chat in chats]
    with reference_model(model, "adapter off") as base:
        answers = [*map(spoken, generate(base, tokenizer, prompts, max_new_tokens=OWN_ANSWER_TOKENS))]
    pairs = [(prompt, answer.lstrip()) for prompt, answer in zip(prompts, answers, strict=True) if answer.strip()]
    return [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer in pairs]


def _outcomes(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Split],
    task: Sequence[Batch],
    result: RestorationResult,
) -> dict[str, Outcome]:
    """Measure the base, the given and the restored adapter, and report them in this order."""
    harmful, benign = ([_prompt(chat) for chat in splits[name].show] for name in ("harmful", "benign"))

    def measured(state: Model) -> Outcome:
        seen, edgy = (measure_behaviour(state, tokenizer, prompts) for prompts in (harmful, benign))
        return Outcome(seen, edgy, objectives.mean_loss(state, task), safety_log_odds(state, tokenizer, harmful[:ODDS]))

    after = measured(model)
    assign(trainable(model), result.before)
    before = measured(model)
    with reference_model(model, "adapter off") as base:
        outcomes = {"base": measured(base), "before": before, "after": after}
    assign(trainable(model), result.after)
    return outcomes
