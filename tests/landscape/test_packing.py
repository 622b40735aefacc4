"""One row for many chats gives each of them the losses it has alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import LlamaForCausalLM

from curvlib.batches import Example, answer_logits, chat_losses, make_batches
from curvlib.curvature.ggn import GGNOperator, ggn
from curvlib.errors import CurvlibError
from curvlib.landscape.packing import pack, pack_logits, pack_losses
from curvlib.parameters import trainable
from tests import cases


def example(head: list[int], tail: list[int]) -> Example:
    return Example((*head, *tail), (*[-100] * len(head), *tail))


# Shared heads, an answer inside another, an answer that is another's prompt, and a stranger.
CHATS = {
    "a": [example([5, 6, 7], [8, 9]), example([5, 6, 11], [8])],
    "b": [example([5, 6, 7], [8, 9, 10]), example([5, 6, 7, 8], [9, 12]), example([40, 41], [42])],
}


def attentive() -> LlamaForCausalLM:
    """A model whose attention is far from uniform, so that positions and masks matter."""
    model = cases.llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 12
    return model


def test_each_chat_has_the_loss_that_it_has_alone() -> None:
    model = attentive()
    packed = pack(CHATS)
    assert packed.input_ids.shape[1] == len({5, 6, 7, 8, 9, 10}) + len([12]) + len([11, 8]) + 3
    found = pack_losses(model, packed)
    for name, chats in CHATS.items():
        with torch.no_grad():
            alone = torch.cat([chat_losses(model, make_batches([chat], 1, 0)[0]) for chat in chats])
        assert torch.allclose(found[name], alone[None], atol=1e-5)
    assert not torch.allclose(found["b"][0, 0], found["b"][0, 1], atol=1e-3)
    twice = pack_losses(model, packed, 2)
    assert all(torch.allclose(twice[name], values.expand(2, -1), atol=1e-5) for name, values in found.items())


@pytest.mark.parametrize("fault", ["positions", "visible"])
def test_wrong_positions_or_a_plain_causal_mask_would_be_seen(fault: str) -> None:
    model, packed = attentive(), pack(CHATS)
    right = torch.cat([*pack_losses(model, packed).values()], dim=1)
    length = packed.input_ids.shape[1]
    wrong = {"positions": torch.arange(length)[None], "visible": torch.ones(length, length).tril().bool()}
    vars(packed)[fault] = wrong[fault]
    assert not torch.allclose(torch.cat([*pack_losses(model, packed).values()], dim=1), right, atol=1e-3)


def test_curvature_of_a_pack_is_that_of_its_batches() -> None:
    model, _ = cases.pair()
    batches = make_batches([chat for chats in CHATS.values() for chat in chats], 5, pad_id=0)
    parameters = trainable(model)
    v = cases.random(sum(p.numel() for p in parameters.values())).float()
    packed = GGNOperator(partial(pack_logits, model), parameters, [pack(CHATS)])
    assert cases.relative_error(packed.matvec(v), ggn(model, batches).matvec(v)) < 1e-4
    assert len(answer_logits(model, batches[0])) == pack(CHATS).tokens


@pytest.mark.parametrize("chats", [{}, {"a": []}, {"a": [example([], [1, 2])]}])
def test_a_chat_without_a_prompt_is_refused(chats: dict[str, list[Example]]) -> None:
    with pytest.raises(CurvlibError, match="expected at least one, each with a prompt"):
        pack(chats)
