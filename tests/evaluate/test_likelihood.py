from __future__ import annotations

import pytest
import torch

from curvlib.errors import CurvlibError
from curvlib.evaluate.likelihood import continuation, text_perplexity, token_losses
from tests.evaluate.toys import SPECIAL, WORDS, dense_losses, llama, tokenizer

PAIRS = [([4, 9, 7], [8, 6]), ([4], [10, 11, 12, 13]), ([4, 5, 6, 7, 8, 9], [20]), ([9, 9], [7, 7, 7])]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_losses_are_those_of_each_row_alone(batch_size: int) -> None:
    model = llama().train()
    found = token_losses(model, [continuation(*pair) for pair in PAIRS], batch_size)
    assert model.training
    for loss, (head, tail) in zip(found, PAIRS, strict=True):
        torch.testing.assert_close(loss.double(), dense_losses(model, head, tail), rtol=1e-4, atol=1e-4)


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    found = text_perplexity(llama(uniform=True), tokenizer(), ["red green blue", "one two", "six"], batch_size=1)
    assert (found.value, found.low, found.high) == pytest.approx((len(SPECIAL + WORDS),) * 3, rel=1e-5)
    assert found.n == 2  # one token alone predicts nothing


def test_perplexity_weighs_tokens_not_texts() -> None:
    tok, model = tokenizer(), llama()
    texts = ["red green blue one two three", "A B"]
    rows = [tok(text)["input_ids"][:4] for text in texts]
    losses = torch.cat([dense_losses(model, row[:1], row[1:]) for row in rows])
    found = text_perplexity(model, tok, texts, max_tokens=4)
    assert found.value == pytest.approx(float(losses.mean().exp()), rel=1e-4)
    assert found.low < found.value < found.high


def test_too_little_text_is_refused() -> None:
    with pytest.raises(CurvlibError, match="at least two"):
        text_perplexity(llama(), tokenizer(), ["red green", "six"])
