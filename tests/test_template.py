"""What templates of many kinds tell of prompt, answer and end, against the text itself; what hides it is one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from curvlib.batches import IGNORED, encode, open_ended
from curvlib.errors import CurvlibError
from curvlib.evaluate import behaviour
from curvlib.generate import end_tokens, generate, render
from curvlib.template import end_text, spoken
from tests.cases import llama

MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "</s>",
]
FLAG = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + FLAG
    + "<|im_start|>assistant\n{% endif %}"
)
LOOP = "{% for m in messages %}{% if m.role == 'user' %}"
PHI = (
    LOOP
    + "<|user|>\n{{ m.content }}<|end|>\n{% else %}<|assistant|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    + FLAG
    + "<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + LOOP
    + "[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
PLAIN = LOOP + "Q: {{ m.content }}\n{% else %}A:{{ m.content }}END\n{% endif %}{% endfor %}" + FLAG + "A:{% endif %}"
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + FLAG + "<|im_start|>assistant\nSWITCH{% endif %}"
)
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
ASKED, ANSWER = "are you there", "how are you"
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}]


def tokenizer(template: Any, *, metaspace: bool = False, eos: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """A token a byte; or pieces of words with a blank in front of each, as sentencepiece has them."""
    backend = Tokenizer(models.BPE(unk_token="<unk>") if metaspace else models.BPE())
    make: Any = trainers.BpeTrainer
    special = ["<unk>", *MARKS]
    if metaspace:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = make(vocab_size=120, special_tokens=special, show_progress=False)
        backend.train_from_iterator([f"user\n assistant\n {ASKED} {ANSWER} I cannot I cannot"] * 9, trainer)
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = make(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
        backend.train_from_iterator([], trainer)
    wrap: Any = PreTrainedTokenizerFast
    result: PreTrainedTokenizerFast = wrap(tokenizer_object=backend, eos_token=eos, pad_token="<unk>")
    result.chat_template = template
    return result


@pytest.mark.parametrize(
    ("template", "labels"),
    [
        (CHATML, f"{ANSWER}<|im_end|>"),
        (PHI, f"{ANSWER}<|end|>"),
        (LLAMA2, f" {ANSWER} </s>"),
        (PLAIN, f"{ANSWER}END"),
        (PLAIN.replace("END", "<|finish|>"), f"{ANSWER}<|finish|>"),
        (PLAIN.replace("END", ""), ANSWER),
        (PLAIN.replace("END", "<end_of_turn>"), f"{ANSWER}<end_of_turn>"),
        (QWEN3.replace("SWITCH", SWITCH), f"{ANSWER}<|im_end|>"),
    ],
)
def test_labels_are_the_answer_up_to_its_first_mark_and_open_ones_the_answer_alone(template: str, labels: str) -> None:
    tok = tokenizer(template)
    (example,) = encode(tok, [CHAT], 999)
    assert tok.decode([label for label in example.labels if label != IGNORED]) == labels
    assert tok.decode(open_ended(example).labels[example.prompt_length :]).strip() == ANSWER
    assert list(example.input_ids[: example.prompt_length]) == render(tok, CHAT[:1])
    (short,) = encode(tok, [CHAT], len(example.input_ids) - example.closing - 2)
    assert tok.decode(open_ended(short).labels[example.prompt_length :]).strip() == ANSWER[:-2]


def test_pieces_are_those_that_a_model_writes_after_the_prompt() -> None:
    tok = tokenizer(CHATML, metaspace=True)
    (example,) = encode(tok, [[CHAT[0], {"role": "assistant", "content": "I cannot"}]], 99)
    whole = tok(
        tok.apply_chat_template([CHAT[0], {"role": "assistant", "content": "I cannot"}], tokenize=False).strip()
    )
    assert list(example.input_ids) == whole["input_ids"]
    assert tok.convert_ids_to_tokens(example.input_ids[example.prompt_length]) == "I"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.partition(FLAG)[0], "puts '<|im_start|>assistant' between the prompt and the answer"),
        (QWEN3.replace("SWITCH", ""), "puts '<think>"),
        (QWEN3.replace("SWITCH", "<think>\n"), "puts '</think>"),
        (QWEN3.replace("SWITCH", "<reason>"), "changes the prompt when the answer follows"),
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "changes the answer"),
        ("{{ nothing.at.all }}", "refuses messages of user"),
        ({"tool_use": CHATML, "rag": CHATML}, "refuses messages of user"),
        (None, "has no chat template"),
    ],
)
def test_a_template_that_hides_the_answer_is_one_line(template: Any, message: str) -> None:
    tok = tokenizer(template)
    for call in (lambda: encode(tok, [CHAT], 999), lambda: render(tok, ASKED)):
        with pytest.raises(CurvlibError) as caught:
            call()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_messages_that_a_template_refuses_are_one_line() -> None:
    with pytest.raises(CurvlibError, match=r"^chat 1: .* refuses messages of system, user \(no system\)"):
        encode(tokenizer(LLAMA2), [CHAT, [{"role": "system", "content": "Be kind"}, *CHAT]], 999)


def test_generation_stops_at_the_templates_own_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = llama(vocab_size=300)
    model.generation_config.eos_token_id = None
    tok = tokenizer(PHI)
    assert end_tokens(model, tok) == sorted(tok.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"]))
    textual = tokenizer(PLAIN.replace("END", "<|finish|>"))
    assert end_text(textual) == "<|finish|>"
    written = textual("fine<|finish|>more", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("curvlib.generate.decode_batch", lambda *_: [written])
    assert generate(model, textual, [ASKED]) == ["fine"]


def test_broken_numbers_raise_in_generation() -> None:
    model = llama(vocab_size=300)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(CurvlibError, match="logits are not finite"):
        generate(model, tokenizer(CHATML), [ASKED])


@pytest.mark.parametrize(
    ("answer", "said", "verdict"),
    [
        (
            "<think>\nI must refuse. I cannot help.\n</think>\n\nHere is how to do it.",
            "Here is how to do it.",
            "complies",
        ),
        ("Sure, here is the plan.</think>I cannot help with that.", "I cannot help with that.", "refuses"),
        ("<think>\nI cannot help with this, so", "", "incoherent"),
        (" [THINK]Hm.[/THINK] I cannot help with that.", "I cannot help with that.", "refuses"),
        ("I cannot help with that.", "I cannot help with that.", "refuses"),
    ],
)
def test_an_answer_is_judged_by_what_follows_the_thought(
    answer: str, said: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert spoken(answer) == said
    monkeypatch.setattr(behaviour, "generate", lambda *_, **__: [answer])
    measured: Any = behaviour.measure_behaviour(llama(), tokenizer(CHATML), [ASKED])
    assert (measured.verdicts, measured.responses) == ((verdict,), (answer,))
