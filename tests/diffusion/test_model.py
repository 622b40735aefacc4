"""Noising, sampling, training and the judge, against closed forms and planted faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from curvlib.diffusion import model as module
from curvlib.diffusion.model import (
    CODES,
    FORWARD,
    NO_DIGIT,
    Denoiser,
    Images,
    denoising_loss,
    digit_rate,
    frechet_distance,
    handwritten,
    judge_training,
    junk,
    noised,
    pretrained,
    quality,
    require_second_derivative,
    sample,
    trained_judge,
    training,
)
from curvlib.errors import CurvlibError
from curvlib.parameters import flatten, trainable


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Knowing(nn.Module):
    """The exact noise prediction where every image is one constant: (x_t - √ᾱ c) / √(1 - ᾱ)."""

    def __init__(self, shades: Tensor) -> None:
        super().__init__()
        self.shades = shades

    def forward(self, x: Tensor, t: Tensor, code: Tensor) -> Tensor:
        a = FORWARD.alphas_cumprod[t].view(-1, 1, 1, 1)
        shade = self.shades[torch.cdist(code, CODES).argmin(1)].view(-1, 1, 1, 1)
        return (x - a.sqrt() * shade) / (1 - a).sqrt()


class Fixed(nn.Module):
    """A judge that answers with the digit nearest to the mean shade."""

    def forward(self, x: Tensor) -> Tensor:
        return -(x.mean((1, 2, 3))[:, None] - torch.linspace(-0.9, 0.9, 10)).abs()


def test_parts_are_disjoint_whole_and_always_alike() -> None:
    parts = handwritten()
    assert [len(part.y) for part in parts.values()] == [1078, 359, 360]
    whole = torch.cat([part.x for part in parts.values()])
    assert float(whole.min()) == -1
    assert float(whole.max()) == 1
    assert torch.equal(parts["test"].x, handwritten()["test"].x)
    assert len(whole.flatten(1).unique(dim=0)) == len(whole)


def test_noising_is_the_formula() -> None:
    images = handwritten()["test"].rows(slice(6))
    batch = noised(images, random())
    a = torch.cumprod(1 - torch.linspace(5e-4, 0.1, 200), 0)[batch.t].view(-1, 1, 1, 1)
    torch.testing.assert_close(batch.x, a.sqrt() * images.x + (1 - a).sqrt() * batch.noise)
    torch.testing.assert_close(batch.code, CODES[images.y])
    assert not torch.allclose(batch.x, a * images.x + (1 - a) * batch.noise, atol=1e-2)  # a likely mistake


def test_sampling_with_the_exact_prediction_gives_the_images_and_the_loss_is_zero() -> None:
    shades, digits = torch.linspace(-0.9, 0.9, 10), torch.arange(10)
    model = Knowing(shades)
    torch.testing.assert_close(sample(model, digits).mean((1, 2, 3)), shades, atol=1e-3, rtol=0)
    images = Images(shades.view(-1, 1, 1, 1).expand(-1, 1, 8, 8), digits)
    assert denoising_loss(model, noised(images, random())).item() < 1e-9
    wrong = sample(Knowing(shades.flip(0)), digits).mean((1, 2, 3))
    assert not torch.allclose(wrong, shades, atol=0.05)


def test_rates_of_known_models() -> None:
    shades = torch.linspace(-0.9, 0.9, 10)
    judge = nn.Sequential(Fixed())
    assert digit_rate(Knowing(shades), judge, 4, n=8) == 1
    assert digit_rate(Knowing(shades.roll(1)), judge, 4, n=8) == 0


def test_training_lowers_the_loss_and_starts_again_from_its_seed() -> None:
    images, (a, b) = handwritten()["train"], (Denoiser(), Denoiser())
    held = noised(images.draw(64, random(1)), random(2))
    before = denoising_loss(a, held).item()
    assert list(training(a, images, 12, 0, scratch=True)) == list(range(1, 13))
    assert list(training(b, images, 12, 0, scratch=True))[-1] == 12
    assert torch.equal(flatten(a.parameters()), flatten(b.parameters()))
    assert denoising_loss(a, held).item() < 0.9 * before
    assert not torch.equal(flatten(Denoiser(1).parameters()), flatten(Denoiser().parameters()))


def test_training_changes_adapters_alone_where_there_are_some() -> None:
    model = Denoiser()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["conv1", "conv2", "time_emb_proj"]), model)
    adapters, before = set(trainable(model)), {name: p.clone() for name, p in model.named_parameters()}
    assert list(training(model, handwritten()["test"], 2, 0)) == [1, 2]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == adapters
    assert all("lora_" in name for name in changed)


def test_a_model_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path))
    images = handwritten()["train"]
    first = flatten(pretrained(images, 2, 0).parameters())
    monkeypatch.setattr(module, "training", lambda *_, **__: map(int, "no step"))  # a step would now fail
    assert torch.equal(flatten(pretrained(images, 2, 0).parameters()), first)
    assert not torch.equal(first, flatten(Denoiser().parameters()))
    with pytest.raises(ValueError, match="invalid literal"):
        pretrained(images.rows(images.y != 4), 2, 0)


def test_the_judge_tells_digits_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path))
    test, judge = handwritten()["test"], trained_judge(150)
    nothing = junk(test, 20, random())
    assert nothing.shape == (140, 1, 8, 8)
    answers = judge(torch.cat([test.x, nothing])).argmax(1)
    assert float((answers[: len(test.y)] == test.y).float().mean()) > 0.9
    assert float((answers[len(test.y) :] == NO_DIGIT).float().mean()) > 0.8
    grey = torch.zeros(10, 1, 8, 8)
    assert (judge(grey).argmax(1) == NO_DIGIT).all()
    accuracy, distance = quality(Knowing(torch.zeros(10)), judge, 4)  # draws plain grey for every digit
    assert accuracy == 0
    with torch.no_grad():
        assert distance > 4 * frechet_distance(judge[:-1](test.x), judge[:-1](handwritten()["train"].x))


def test_a_judge_of_shuffled_digits_is_no_better_than_chance() -> None:
    torch.manual_seed(0)
    test, judge = handwritten()["test"], nn.Sequential(nn.Flatten(), nn.Linear(64, 11))
    assert list(judge_training(judge, 100))[-1] == 100
    shuffled = test.y[torch.randperm(len(test.y), generator=random())]
    right, chance = ((judge(test.x).argmax(1) == y).float().mean() for y in (test.y, shuffled))
    assert float(right) > 0.6 > 0.3 > float(chance)


def test_frechet_distance_of_normal_samples() -> None:
    x = torch.randn(4000, 3, generator=random(), dtype=torch.float64)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)).T, x - x.mean(0), upper=True, left=False)
    assert abs(frechet_distance(x, x)) < 1e-9
    assert frechet_distance(x, x + 2) == pytest.approx(12)  # |μ|² = 3 · 2²
    assert frechet_distance(x, 3 * x) == pytest.approx(12)  # 3 · (3 - 1)²


def test_fused_attention_is_refused_and_plain_attention_has_a_second_derivative() -> None:
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(CurvlibError, match="no second derivative on a CPU: call set_processor"):
        require_second_derivative(net)
    for layer in net.modules():
        if isinstance(layer, Attention):
            layer.set_processor(AttnProcessor())
    require_second_derivative(net)
    require_second_derivative(Denoiser())
    loss = mse_loss(net(torch.randn(1, 1, 8, 8, generator=random()), 3).sample, torch.zeros(1, 1, 8, 8))
    weights = [p for p in net.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    twice = torch.autograd.grad(sum(slope.square().sum() for slope in slopes), weights, allow_unused=True)
    assert all(piece is None or torch.isfinite(piece).all() for piece in twice)
