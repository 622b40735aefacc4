"""What a chat template writes: which tokens are the prompt and the answer, where the answer ends, what stops it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from curvlib.errors import CurvlibError

Chat = list[dict[str, str]]
MARK = "curvlib"  # stands for an answer's text
ADVICE = "give a tokenizer with another chat template"
_THOUGHT = re.compile(r"\s*(?:<(think|thinking|thought|reasoning)>|\[(THINK)\])")
_CLOSE = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]")


def write(tokenizer: PreTrainedTokenizerBase, chat: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
    """Return a chat as the tokenizer's template writes it, thinking switched off where the template has that switch.

    With ``prompt`` the text ends where the assistant's answer begins.

    Raises:
        CurvlibError: the tokenizer has no template, or its template refuses these messages.
    """
    template, name = tokenizer.chat_template, tokenizer.name_or_path
    if not template:
        raise CurvlibError(f"the tokenizer of {name!r} has no chat template: give an instruction-tuned (chat) model")
    switch: dict[str, Any] = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
    try:
        return str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=prompt, **switch))
    except Exception as error:  # Jinja's own errors, the template's and transformers': all are about these messages
        reason = " ".join(str(error).split())[:160]
        roles = ", ".join(message["role"] for message in chat)
        advice = "leave out what it does not take, such as a system message, or " + ADVICE
        raise CurvlibError(f"the chat template of {name!r} refuses messages of {roles} ({reason}): {advice}") from error


def prompt_text(tokenizer: PreTrainedTokenizerBase, chat: Sequence[dict[str, str]]) -> str:
    """Return the text of a chat up to where the answer begins; raises as :func:`write` and :func:`ending`."""
    text = write(tokenizer, chat, prompt=True)
    ending(tokenizer)
    return text


def split(tokenizer: PreTrainedTokenizerBase, chat: Sequence[dict[str, str]]) -> tuple[str, str, str]:
    """Return a chat's prompt, its last answer, and what the template writes behind it.

    Raises:
        CurvlibError: the template does not write the prompt, and then at once the answer, as generation needs it.
    """
    prompt, full = write(tokenizer, chat[:-1], prompt=True), write(tokenizer, chat)
    if not full.startswith(prompt):
        raise CurvlibError(f"the template changes the prompt when the answer follows: {ADVICE}")
    content, body = chat[-1]["content"], full[len(prompt) :]
    for text in (content, content.strip()):
        start = body.find(text)
        if start >= 0 and not body[:start].strip():
            return prompt, body[: start + len(text)], body[start + len(text) :]
    raise CurvlibError(
        f"the template puts {body.partition(content)[0].strip()[:40]!r} between the prompt and the answer, or changes "
        f"the answer (a template that always thinks, or one that ignores add_generation_prompt): {ADVICE}"
    )


def ending(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the template writes behind an answer, without blanks at its end; may be empty. Raises as `split`."""
    return _ending(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=16)
def _ending(tokenizer: PreTrainedTokenizerBase, _template: str) -> str:
    probe = [{"role": "user", "content": "curves"}, {"role": "assistant", "content": MARK}]
    return split(tokenizer, probe)[2].rstrip()


def answer_tokens(tokenizer: PreTrainedTokenizerBase, chat: Sequence[dict[str, str]]) -> tuple[list[int], int, int]:
    """Return a chat's tokens, how many of them are the prompt's, and how many at the end close the answer.

    The text is tokenised whole, so an answer has the tokens that a model writes after the prompt. Up to the first mark
    (added token) behind the answer all counts: this is what stops generation.

    Raises:
        CurvlibError: the template does not tell (see :func:`split`), or the tokenizer does not tell places in a text.
    """
    prompt, answer, after = split(tokenizer, chat)
    if not tokenizer.is_fast:
        raise CurvlibError(f"the tokenizer of {tokenizer.name_or_path!r} is not a fast one: save it as tokenizer.json")
    stop, text = len(prompt) + len(answer), (prompt + answer + after.rstrip())
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, ends = list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]
    head = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    first = len(head) if ids[: len(head)] == head else sum(end <= len(prompt) for end in ends)
    closing = range(first + sum(end <= stop for end in ends[first:]), len(ids))
    marks = mark_tokens(tokenizer)
    last = next((place + 1 for place in closing if ids[place] in marks), len(ids))
    return ids[:last], first, last - closing.start


def mark_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that are no text: special and other added ones."""
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the first mark that the template writes behind an answer; None where it writes text or nothing there."""
    ids, marks = tokenizer(ending(tokenizer), add_special_tokens=False)["input_ids"], mark_tokens(tokenizer)
    return next((int(token) for token in ids if token in marks), None)


def end_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that closes an answer where no single token does, such as ``<|finish|>`` cut into pieces."""
    return ending(tokenizer) if end_token(tokenizer) is None else ""


def spoken(answer: str) -> str:
    """Return what an answer says after its thought; nothing where the thought does not end.

    >>> spoken("<think>Well.</think> Yes."), spoken("<think>Well, I"), spoken("Yes.")
    ('Yes.', '', 'Yes.')
    """
    if not _THOUGHT.match(answer) and "</think>" not in answer:
        return answer
    _, *rest = _CLOSE.split(answer)
    return rest[-1].strip() if rest else ""
