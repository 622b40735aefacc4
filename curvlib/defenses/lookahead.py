r"""LookAhead Tuning: show the first answer tokens in the prompt, so that they need not be learnt (arXiv 2503.19041).

A chat (x, y) is trained on as

.. math:: \text{real: } (x \oplus c \oplus y_{1:m},\ y), \qquad \text{virtual: } (x \oplus c \oplus P,\ P \oplus y),

with the connector c = " The answer begins with: ", m = 6 in the paper and a fixed phrase P; prompts at inference are
unchanged. The equations are the paper's as gathered for this course; its phrase P is not at hand, ours are searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from curvlib.batches import Example
from curvlib.defenses.method import Defended, Method, Setting
from curvlib.errors import CurvlibError
from curvlib.evaluate.likelihood import continuation
from curvlib.template import end_token, prompt_text

CONNECTOR = " The answer begins with: "
MARK = "¤"  # stands for the user's text while the template's tokens after it are found


@dataclass(frozen=True)
class Preview:
    """Puts tokens at the end of the user's message: ``closing`` are the template's tokens between it and the answer."""

    connector: tuple[int, ...]
    closing: tuple[int, ...]
    end: int

    def real(self, example: Example, m: int) -> Example:
        """Return the chat whose prompt tells the first ``m`` answer tokens, never the end-of-turn token."""
        answer = example.input_ids[example.prompt_length :]
        return self._joined(example, tuple(token for token in answer[:m] if token != self.end), answer)

    def virtual(self, example: Example, phrase: tuple[int, ...]) -> Example:
        """Return the chat whose prompt tells ``phrase`` and whose answer begins with it."""
        return self._joined(example, phrase, (*phrase, *example.input_ids[example.prompt_length :]))

    def _joined(self, example: Example, shown: tuple[int, ...], answer: tuple[int, ...]) -> Example:
        cut = example.prompt_length - len(self.closing)
        if example.input_ids[cut : example.prompt_length] != self.closing:
            raise CurvlibError(
                "a prompt does not end as the template's do: LookAhead needs one user message at its end"
            )
        return continuation((*example.input_ids[:cut], *self.connector, *shown, *self.closing), answer)


def preview_of(tokenizer: PreTrainedTokenizerBase) -> Preview:
    """Return the preview for a tokenizer's chat template."""
    closing = tokens(tokenizer, prompt_text(tokenizer, [{"role": "user", "content": MARK}]).partition(MARK)[2])
    end = end_token(tokenizer)
    return Preview(tokens(tokenizer, CONNECTOR), closing, int(tokenizer.eos_token_id if end is None else end))


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Return the tokens of a text without special ones around it."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def real(setting: Setting, m: int) -> Defended:
    """Fine-tune on chats with real previews; cost: that of the fine-tune with longer prompts."""
    preview = preview_of(setting.tokenizer)
    return _tuned(setting, [preview.real(example, m) for example in setting.examples()])


def virtual(setting: Setting, phrase: str) -> Defended:
    """Fine-tune on chats with a virtual preview; cost: that of the fine-tune with longer chats."""
    preview, shown = preview_of(setting.tokenizer), tokens(setting.tokenizer, phrase)
    return _tuned(setting, [preview.virtual(example, shown) for example in setting.examples()])


def _tuned(setting: Setting, examples: Sequence[Example]) -> Defended:
    model = setting.start()
    return Defended(model, setting.train(model, examples))


PHRASES = ("Let me look at this.", "Let's think about this request first.", "I will answer with care.")
REAL = Method("LookAhead, real", "during", "2503.19041", real, ({"m": 6}, {"m": 3}, {"m": 12}))
VIRTUAL = Method("LookAhead, virtual", "during", "2503.19041", virtual, tuple({"phrase": p} for p in PHRASES))
