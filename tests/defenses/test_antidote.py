"""Antidote's score, what it prunes, and that pruning everything is the aligned model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from curvlib.batches import answer_logits, make_batches, taken_apart
from curvlib.defenses.antidote import antidote, input_norms, pruned
from curvlib.defenses.method import Setting
from curvlib.landscape.directions import adapter_direction, linear_layers
from tests import cases
from tests.defenses.tiny import aligned, logits, tiny  # noqa: F401  a fixture


def test_each_row_loses_its_highest_scores_whatever_their_signs() -> None:
    delta, norms = torch.tensor([[1.0, -5.0, 2.0, 0.5], [4.0, 3.0, -2.0, 1.0]]), torch.tensor([10.0, 1.0, 1.0, 0.1])
    assert pruned(delta, norms, 0.25).tolist() == [[0, -5, 2, 0.5], [0, 3, -2, 1]]
    assert pruned(delta, norms, 0.5).tolist() == [[0, 0, 2, 0.5], [0, 0, -2, 1]]
    assert torch.equal(pruned(delta, norms, 0.0), delta)
    assert not pruned(delta, norms, 1.0).any()


def test_norms_are_those_of_the_tokens_and_not_of_padding() -> None:
    model = cases.nf4_llama()
    chats = taken_apart(cases.batches(3))
    together, apart = (input_norms(model, make_batches(chats, size, 0)) for size in (3, 1))
    assert set(together) == set(adapter_direction(model).chains)
    for name, norms in together.items():
        assert cases.relative_error(norms, apart[name]) < 1e-5
    (batch,) = make_batches(chats[:1], 1, 0)
    seen: list[torch.Tensor] = []
    name, layer = next(iter(linear_layers(model).items()))
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    answer_logits(model, batch, once=False)
    handle.remove()
    assert cases.relative_error(input_norms(model, [batch])[name], seen[0].norm(dim=0)) < 1e-5
    assert not any(layer._forward_pre_hooks for layer in linear_layers(model).values())


@pytest.mark.parametrize(("share", "what"), [(0.0, "tuned"), (1.0, "aligned")])
def test_between_the_fine_tune_and_the_aligned_model(share: float, what: str, tiny: Setting) -> None:  # noqa: F811
    expected = logits(cases.nf4_llama() if what == "tuned" else aligned())
    torch.testing.assert_close(logits(antidote(tiny, share).model), expected, atol=1e-4, rtol=0)


def test_harmful_answers_choose_what_goes(tiny: Setting) -> None:  # noqa: F811
    other = replace(tiny.chats, safety=replace(tiny.chats.safety, compliances=tiny.chats.task))
    first, second = (logits(antidote(setting, 0.3).model) for setting in (tiny, replace(tiny, chats=other)))
    assert not torch.equal(first, second)
