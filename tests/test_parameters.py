"""The flat view: exact round trips, and values that always come back bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvlib.errors import CurvlibError
from curvlib.parameters import assign, flatten, shifted, trainable, unflatten
from tests.cases import random


def model() -> nn.Sequential:
    result = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    result[0].bias.requires_grad_(False)
    return result


def test_trainable_keeps_the_models_order_and_leaves_out_what_is_frozen() -> None:
    assert list(trainable(model())) == ["0.weight", "1.weight", "1.bias"]
    with pytest.raises(CurvlibError, match="no parameter of the model is trainable"):
        trainable(model().requires_grad_(False))


def test_flatten_and_unflatten_are_inverse() -> None:
    parameters = trainable(model())
    vector = flatten(parameters)
    assert vector.shape == (12,)
    assert not vector.requires_grad
    for piece, parameter in zip(unflatten(vector, parameters), parameters.values(), strict=True):
        assert torch.equal(piece, parameter)
    vector.zero_()  # a copy: the model keeps its values
    assert bool(parameters["0.weight"].any())


@pytest.mark.parametrize("shape", [(11,), (13,), (12, 1)])
def test_a_vector_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CurvlibError, match=r"expected \(12,\)"):
        unflatten(torch.zeros(shape), trainable(model()))


def test_assign_writes_in_place_and_in_the_parameters_dtype() -> None:
    parameters = trainable(model())
    places = [parameter.data_ptr() for parameter in parameters.values()]
    vector = random(12)
    assign(parameters, vector)
    assert torch.equal(flatten(parameters), vector.float())
    assert places == [parameter.data_ptr() for parameter in parameters.values()]


def test_shifted_adds_and_restores_bit_by_bit_even_after_an_error() -> None:
    parameters, step = trainable(model()), random(12, dtype=torch.float32)
    before = flatten(parameters)

    def fail() -> None:
        with shifted(parameters, step):
            torch.testing.assert_close(flatten(parameters), before + step)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(flatten(parameters), before)  # before + step - step would differ in the last bits
    assert not torch.equal(before + step - step, before)
