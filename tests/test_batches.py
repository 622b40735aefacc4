"""Chats to batches: which tokens count, and that padding and batching change nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from curvlib.batches import (
    IGNORED,
    Batch,
    Example,
    answer_logits,
    answer_loss,
    answer_targets,
    chat_losses,
    encode,
    make_batches,
    open_ended,
)
from curvlib.errors import CurvlibError
from tests.cases import batches, llama, pair
from tests.evaluate.toys import tokenizer

CHAT = [{"role": "user", "content": "Write a plan"}, {"role": "assistant", "content": "The answer is A"}]


def test_only_the_last_answer_and_its_end_token_count() -> None:
    tok = tokenizer()
    (example,) = encode(
        tok, [[*CHAT, {"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]], 99
    )
    answer = [label for label in example.labels if label != IGNORED]
    assert tok.convert_ids_to_tokens(answer) == ["blue", "<end>"]
    assert list(example.input_ids[-2:]) == answer
    prompt = tok.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    assert list(encode(tok, [CHAT], 99)[0].input_ids[: len(prompt)]) == prompt  # what generation would see


def test_long_answers_are_cut_and_prompts_without_room_refused() -> None:
    tok = tokenizer()
    whole = encode(tok, [CHAT], 99)[0]
    prompt = whole.labels.count(IGNORED)
    assert encode(tok, [CHAT], prompt + 2)[0] == Example(whole.input_ids[: prompt + 2], whole.labels[: prompt + 2])
    with pytest.raises(CurvlibError, match=f"chat 0 has a prompt of {prompt} tokens and no answer token"):
        encode(tok, [CHAT], prompt)
    with pytest.raises(CurvlibError, match="chat 1 does not end with an assistant message"):
        encode(tok, [CHAT, CHAT[:1]], 99)


def test_an_open_ended_answer_has_no_end_and_at_most_so_many_tokens() -> None:
    whole = Example((1, 2, 3, 4, 5), (IGNORED, IGNORED, 3, 4, 5))
    assert open_ended(whole) == open_ended(whole, 9) == Example((1, 2, 3, 4), (IGNORED, IGNORED, 3, 4))
    assert open_ended(whole, 1) == Example((1, 2, 3), (IGNORED, IGNORED, 3))


def test_batches_are_sorted_and_padded_on_the_left() -> None:
    examples = [
        Example((5, 6, 7, 8), (IGNORED, IGNORED, 7, 8)),
        Example((1, 2), (IGNORED, 2)),
        Example((3, 4), (IGNORED, 4)),
    ]
    short, long = make_batches(examples, 2, pad_id=9)
    assert short.input_ids.tolist() == [[1, 2], [3, 4]]
    assert (long.tokens, long.answer_length, short.tokens, short.answer_length) == (2, 2, 2, 1)
    (all_three,) = make_batches(examples, 3, pad_id=9)
    assert all_three.input_ids.tolist()[0] == [9, 9, 1, 2]
    assert all_three.attention_mask.tolist()[0] == [0, 0, 1, 1]
    assert answer_targets(all_three).tolist() == [2, 4, 7, 8]
    assert [part.input_ids.shape for part in all_three.parts(2)] == [(2, 2), (1, 4)]
    with pytest.raises(CurvlibError, match="0 examples"):
        make_batches([], 2, pad_id=9)


def test_a_gpu_gets_batches_of_few_positions_and_a_cpu_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example((1,) * length, (IGNORED, *(1,) * (length - 1))) for length in (2, 3, 4, 5, 9)]
    assert [len(batch) for batch in make_batches(examples, 4, pad_id=0)] == [4, 1]
    monkeypatch.setattr("curvlib.batches.AT_ONCE", 10)
    small = make_batches(examples, 4, pad_id=0, device="cuda")
    assert [tuple(batch.input_ids.shape) for batch in small] == [(2, 3), (2, 5), (1, 9)]
    monkeypatch.setattr("curvlib.batches.AT_ONCE", 1)
    assert [len(batch) for batch in make_batches(examples, 4, pad_id=0, device="cuda")] == [1] * 5


def test_logits_are_those_of_each_chat_alone_at_its_answer() -> None:
    _, twin = pair()
    for batch in batches():
        expected = []
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            logits = twin(input_ids=ids[mask.bool()][None]).logits[0, :-1]
            expected.append(logits[labels[mask.bool()][1:] != IGNORED])
        torch.testing.assert_close(answer_logits(twin, batch), torch.cat(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("width", "answer", "once", "rows"), [(50, 3, True, 32), (50, 40, True, 40), (9, 3, True, 8), (50, 3, False, 3)]
)
def test_the_head_gets_enough_rows_for_exact_sums(width: int, answer: int, once: bool, rows: int) -> None:
    model, seen = llama(), list[int]()
    hook = model.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[1]))
    ids = tuple(1 + n % 7 for n in range(width))
    (batch,) = make_batches([Example(ids, (IGNORED,) * (width - answer) + ids[-answer:])], 1, pad_id=0)
    assert answer_logits(model, batch, once=once).shape[0] == answer
    hook.remove()
    assert seen == [rows]


def test_losses_are_means_over_answer_tokens() -> None:
    _, twin = pair()
    batch = batches()[1]
    log_p = answer_logits(twin, batch).log_softmax(1)
    nll = -log_p[torch.arange(batch.tokens), answer_targets(batch)]
    torch.testing.assert_close(answer_loss(twin, batch), nll.mean())
    lengths = (batch.labels != IGNORED).sum(1).tolist()
    torch.testing.assert_close(chat_losses(twin, batch), torch.stack([part.mean() for part in nll.split(lengths)]))
    half = llama().bfloat16()
    assert answer_loss(half, batch).dtype == torch.float32
    expected = cross_entropy(answer_logits(half, batch).float(), answer_targets(batch))
    torch.testing.assert_close(answer_loss(half, batch), expected)


@pytest.mark.parametrize("label", [IGNORED, 1])
def test_a_batch_without_answer_or_without_prompt_is_refused(label: int) -> None:
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(CurvlibError, match="of 3 positions, expected at least one answer token and a prompt token"):
        answer_logits(llama(), Batch(ids, ids, torch.full_like(ids, label)))
