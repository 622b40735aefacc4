"""Directions live in effective-weight space, and a step along them leaves the model as it was, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlib.batches import chat_losses
from curvlib.errors import CurvlibError
from curvlib.landscape import directions
from curvlib.landscape.directions import Direction, moved, random_direction
from curvlib.parameters import flatten, trainable
from tests import cases

BATCH = cases.batches(3)[0]


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return chat_losses(model, BATCH)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def added(model: Any, direction: Direction, factor: float) -> None:
    """Write a step into a dense model's weights: what ``moved`` must be equal to."""
    with torch.no_grad():
        for name in direction.chains:
            model.get_submodule(name).weight += factor * direction.delta(name).to(model.get_submodule(name).weight)


@pytest.mark.parametrize("dense", [False, True])
def test_a_step_equals_the_same_change_of_dense_weights(dense: bool) -> None:
    model, twin = cases.llama(), cases.llama()
    step = random_direction(model, seed=0, rank=3)
    step = Direction({name: (step.delta(name),) for name in step.chains}) if dense else step
    before = outputs(model)
    with moved(model, [(step, 0.2), (step, 0.1)]):
        stepped = outputs(model)
    added(twin, step, 0.3)
    assert cases.relative_error(stepped, outputs(twin)) < 1e-5
    assert cases.relative_error(before, outputs(twin)) > 1e-2


@pytest.mark.parametrize("interrupt", [None, KeyboardInterrupt, ValueError])
def test_a_4bit_model_is_bit_identical_afterwards_also_when_interrupted(
    interrupt: type[BaseException] | None, device: str
) -> None:
    model = cases.nf4_llama(device=device)
    step = random_direction(model, seed=0)
    before, losses = snapshot(model), outputs(model)
    try:
        with moved(model, [(step, 0.5)]), moved(model, [(step, -0.2)]):
            assert not torch.equal(outputs(model), losses)
            if interrupt:
                raise interrupt
    except (KeyboardInterrupt, ValueError):
        pass
    assert before.keys() == snapshot(model).keys()
    assert all(torch.equal(before[name], value) for name, value in snapshot(model).items())
    assert torch.equal(outputs(model), losses)


def test_a_failure_while_the_hooks_are_set_leaves_none_behind() -> None:
    model = cases.llama()
    name = next(iter(directions.linear_layers(model)))
    losses, fine = outputs(model), random_direction(model, seed=0)
    with (
        pytest.raises(CurvlibError, match="has no layer 'elsewhere'"),
        moved(model, [(fine, 1.0), (Direction({"elsewhere": ()}), 1.0)]),
    ):
        pass
    assert torch.equal(outputs(model), losses)
    assert not model.get_submodule(name)._forward_hooks


def test_the_adapter_is_a_direction_from_the_model_without_it() -> None:
    model = cases.nf4_llama()
    losses, step = outputs(model), directions.adapter_direction(model)
    with model.disable_adapter():
        base = outputs(model)
        with moved(model, [(step, 1.0)]):
            assert cases.relative_error(outputs(model), losses) < 1e-5
    assert cases.relative_error(base, losses) > 1e-3


def rescaled(model: Any, factor: float) -> Any:
    """The same function from other LoRA factors: (A / c, c B)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(factor if "lora_B" in name else 1 / factor)
    return model


def test_rescaled_lora_factors_have_the_same_slices() -> None:
    model, other = cases.nf4_llama(), rescaled(cases.nf4_llama(), 7.0)
    first, second = (random_direction(m, seed=3) for m in (model, other))
    assert all(torch.allclose(first.delta(name), second.delta(name), atol=1e-6) for name in first.chains)
    with moved(model, [(first, 0.3)]), moved(other, [(second, 0.3)]):
        assert cases.relative_error(outputs(other), outputs(model)) < 1e-5
    steps = [directions.adapter_direction(m) for m in (model, other)]
    assert all(cases.relative_error(steps[1].delta(name), steps[0].delta(name)) < 1e-6 for name in first.chains)
    sizes = [flatten(trainable(m)).norm() for m in (model, other)]  # what a slice in (A, B) would be scaled by
    assert sizes[1] > 2 * sizes[0]


@pytest.mark.parametrize("normalise", ["row", "layer"])
def test_rescaled_layers_have_the_same_slices(normalise: Any) -> None:
    model, other = cases.llama(), cases.llama()
    with torch.no_grad():
        for layer in other.model.layers:  # down · (act(gate) ⊙ up): up by 5 and down by 1/5 is the same function
            layer.mlp.up_proj.weight.mul_(5)
            layer.mlp.down_proj.weight.div_(5)
    first, second = (random_direction(m, seed=1, normalise=normalise) for m in (model, other))
    assert cases.relative_error(outputs(other), outputs(model)) < 1e-6
    with moved(model, [(first, 0.3)]), moved(other, [(second, 0.3)]):
        assert cases.relative_error(outputs(other), outputs(model)) < 1e-5
    with moved(model, [(first, 0.3)]), moved(other, [(first, 0.3)]):  # without normalisation
        assert cases.relative_error(outputs(other), outputs(model)) > 1e-3


@pytest.mark.parametrize("normalise", ["row", "layer"])
def test_a_random_direction_is_as_large_as_the_weights(normalise: Any) -> None:
    model = cases.nf4_llama()
    step = random_direction(model, seed=0, normalise=normalise)
    for name, layer in directions.linear_layers(model).items():
        weight, delta = directions.effective_weight(layer), step.delta(name)
        assert step.norm(name) == pytest.approx(float(weight.norm()), rel=1e-4)
        assert torch.allclose(delta.norm(dim=1), weight.norm(dim=1), rtol=1e-4) == (normalise == "row")
    assert not torch.equal(step.delta(name), random_direction(model, seed=1).delta(name))


def test_effective_weights_hold_the_adapter_and_its_switch() -> None:
    model, twin = cases.pair()
    base: Any = twin.model.get_base_model()
    for name, layer in directions.linear_layers(model).items():
        exact = base.get_submodule(name)
        wanted = exact.base_layer.weight + exact.get_delta_weight("default")
        assert cases.relative_error(directions.effective_weight(layer), wanted) < 1e-6
        with model.disable_adapter():
            assert torch.equal(directions.effective_weight(layer).double(), exact.base_layer.weight)


def test_arithmetic_agrees_with_dense_matrices() -> None:
    model = cases.llama()
    thin, other = (random_direction(model, seed=seed, rank=2) for seed in (0, 1))
    dense = Direction({name: (other.delta(name),) for name in other.chains})
    for second in (other, dense):
        found = thin - 2.0 * second
        for name in thin.chains:
            assert torch.allclose(found.delta(name), thin.delta(name) - 2 * other.delta(name), atol=1e-5)
            assert found.norm(name) == pytest.approx(float(found.delta(name).norm()), rel=1e-4)
    assert found.size == pytest.approx(sum(found.norm(name) ** 2 for name in found.chains) ** 0.5)


def test_steps_add_up_whatever_their_form() -> None:
    model = cases.llama()
    thin, other = (random_direction(model, seed=seed) for seed in (0, 1))
    dense = Direction({name: (other.delta(name),) for name in other.chains})
    with moved(model, [(0.2 * thin + -0.2 * other, 1.0)]):
        wanted = outputs(model)
    with moved(model, [(thin, 0.2), (dense, 0.1), (other, -0.3)]):
        assert cases.relative_error(outputs(model), wanted) < 1e-5
    with moved(model, [(thin, 0.2), (dense, 0.1)]):
        assert cases.relative_error(outputs(model), wanted) > 1e-3
    with moved(model, [(thin, 0.0)]):
        assert not any(module._forward_hooks for module in model.modules())


def test_the_null_of_a_step_has_its_norm_in_every_layer_and_another_direction() -> None:
    step = directions.adapter_direction(cases.nf4_llama())
    noise = directions.random_like(step, seed=0)
    for name in step.chains:
        assert noise.norm(name) == pytest.approx(step.norm(name), rel=1e-4)
        cosine = float((noise.delta(name) * step.delta(name)).sum()) / step.norm(name) ** 2
        assert abs(cosine) < 0.2


def test_a_full_fine_tune_is_the_difference_of_its_weights() -> None:
    before, after = cases.llama(seed=0), cases.llama(seed=0)
    step = random_direction(before, seed=0)
    added(after, step, 0.1)
    found = directions.weight_difference(before, after)
    assert all(torch.allclose(found.delta(name), 0.1 * step.delta(name), atol=1e-6) for name in step.chains)
    assert not any("lm_head" in name for name in found.chains)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(CurvlibError, match="has no linear layer"):
        directions.linear_layers(nn.Sequential(nn.Tanh()))


def test_the_step_is_multiplied_by_numbers_and_matrices() -> None:
    model, place = cases.nf4_llama(), "model.layers.0.mlp.down_proj"
    before = directions.adapter_direction(model)
    turn = cases.random(cases.HIDDEN, cases.HIDDEN).float()
    directions.multiply_adapter(model, lambda name: turn if name == place else 0.5)
    after = directions.adapter_direction(model)
    torch.testing.assert_close(after.delta(place), turn @ before.delta(place), rtol=1e-4, atol=1e-5)
    other = place.replace("down", "up")
    torch.testing.assert_close(after.delta(other), 0.5 * before.delta(other))
