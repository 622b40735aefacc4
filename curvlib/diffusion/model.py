r"""Digits of 8 × 8 pixels in [-1, 1], a denoising diffusion model of 160 thousand parameters, and a judge.

.. math:: x_t = \sqrt{\bar\alpha_t}\,x + \sqrt{1-\bar\alpha_t}\,\epsilon, \qquad
    L(\theta) = \operatorname{mean}\lVert \epsilon - \epsilon_\theta(x_t, t, c) \rVert^2 ,

with a fixed random code c for each digit. Sources: Ho et al., arXiv 2006.11239; Song et al., arXiv 2010.02502 for the
sampler. Images are scikit-learn's (Alpaydin and Kaynak 1998, UCI), schedulers and U-Net are diffusers'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, mse_loss

from curvlib.artifacts import artifact
from curvlib.errors import CurvlibError
from curvlib.parameters import trainable

TIMES = 200  # the betas are those of Ho et al. for 1,000 times, five times as large
FORWARD: Any = DDPMScheduler(num_train_timesteps=TIMES, beta_start=5e-4, beta_end=0.1)
CODES = torch.randn(10, 64, generator=torch.Generator().manual_seed(1000))  # digit -> code
NO_DIGIT = 10  # the judge's eleventh answer


class Images(NamedTuple):
    """Images ``x`` (n, 1, 8, 8) and the digits ``y`` (n,) that they show."""

    x: Tensor
    y: Tensor

    def rows(self, rows: Tensor | slice) -> Images:
        """Return some of the images."""
        return Images(self.x[rows], self.y[rows])

    def draw(self, n: int, generator: torch.Generator) -> Images:
        """Return n images drawn with replacement."""
        return self.rows(torch.randint(len(self.y), (n,), generator=generator))


class Noised(NamedTuple):
    """A frozen batch: noised images ``x`` (B, 1, 8, 8), times ``t`` (B,), codes (B, 64) and the noise in x."""

    x: Tensor
    t: Tensor
    code: Tensor
    noise: Tensor


class Denoiser(nn.Module):
    """diffusers' U-Net without attention: ``denoiser(x, t, code)`` predicts the noise."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32)}
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        options = {"layers_per_block": 1, "norm_num_groups": 8, "add_attention": False, "class_embed_type": "identity"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net: Any = UNet2DModel(**shape, **blocks, **options)

    def forward(self, x: Tensor, t: Tensor, code: Tensor) -> Tensor:
        """Return the predicted noise, of the shape of x."""
        noise: Tensor = self.net(x, t * (1000 // TIMES), class_labels=code, return_dict=False)[0]
        return noise


def handwritten() -> dict[str, Images]:
    """Return the 1,797 digits as ``train`` (60 %), ``held_out`` and ``test`` (20 % each), always alike."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    whole = Images(torch.tensor(x[order] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y[order]))
    parts = {"train": slice(1078), "held_out": slice(1078, 1437), "test": slice(1437, None)}
    return {name: whole.rows(part) for name, part in parts.items()}


def noised(images: Images, generator: torch.Generator) -> Noised:
    """Noise images, each at a time of its own."""
    t = torch.randint(TIMES, (len(images.y),), generator=generator)
    noise = torch.randn(images.x.shape, generator=generator)
    return Noised(FORWARD.add_noise(images.x, noise, t), t, CODES[images.y], noise)


def denoising_loss(denoiser: nn.Module, batch: Noised) -> Tensor:
    """Return the mean squared error of the predicted noise."""
    return mse_loss(denoiser(batch.x, batch.t, batch.code), batch.noise)


@torch.no_grad()
def sample(denoiser: nn.Module, digits: Tensor, seed: int = 0, steps: int = 25) -> Tensor:
    """Draw one image for each digit (n,) by deterministic DDIM; costs ``steps`` evaluations."""
    scheduler: Any = DDIMScheduler.from_config(FORWARD.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = torch.randn(len(digits), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        noise = denoiser(x, t.expand(len(digits)), CODES[digits])
        x = scheduler.step(noise, t, x, use_clipped_model_output=True).prev_sample
    return x.clamp(-1, 1)


def training(denoiser: nn.Module, images: Images, steps: int, seed: int, *, scratch: bool = False) -> Iterator[int]:
    """Train what is trainable with Adam, yield the steps done; ``scratch``: warm-up over 50, then a cosine to 0."""
    rate, batch = (3e-3, 64) if scratch else (3e-4, 32)
    parameters, generator = list(trainable(denoiser).values()), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(parameters, lr=rate)
    for step in range(steps):
        share = min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2 if scratch else 1.0
        optimiser.param_groups[0]["lr"] = rate * share
        loss = denoising_loss(denoiser, noised(images.draw(batch, generator), generator))
        descend(optimiser, parameters, torch.autograd.grad(loss, parameters))
        yield step + 1


def descend(optimiser: torch.optim.Optimizer, parameters: list[Tensor], gradient: tuple[Tensor, ...]) -> None:
    """Take one step along a gradient that is cut to norm 1."""
    for parameter, piece in zip(parameters, gradient, strict=True):
        parameter.grad = piece.clone()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()


def pretrained(images: Images, steps: int, seed: int) -> Denoiser:
    """Return a denoiser trained on these images, made once and kept in the cache."""
    config = {"steps": steps, "seed": seed, "images": len(images.y), "digits": sorted(set(images.y.tolist()))}
    model = Denoiser(seed)
    cached("diffusion-model", config, model, training(model, images, steps, seed, scratch=True))
    return model


def cached(stage: str, config: Mapping[str, Any], module: nn.Module, steps: Iterable[object]) -> None:
    """Give the module the weights that it has when all ``steps`` are taken; they are taken once for all runs."""

    def build(folder: Path) -> None:
        list(steps)
        save_file(module.state_dict(), folder / "weights.safetensors")

    module.load_state_dict(load_file(artifact(stage, config, build) / "weights.safetensors"))


def require_second_derivative(model: nn.Module) -> None:
    """Raise CurvlibError if a layer has diffusers' fused attention, which cannot be differentiated twice on a CPU."""
    for name, layer in model.named_modules():
        if isinstance(layer, Attention) and type(layer.processor) is not AttnProcessor:
            advice = "call set_processor(AttnProcessor()) on each layer, or build the model with add_attention=False"
            raise CurvlibError(f"{name} has fused attention, which has no second derivative on a CPU: {advice}")


def junk(images: Images, n: int, generator: torch.Generator) -> Tensor:
    """Return 7 n images (7n, 1, 8, 8) of no digit, n of each kind."""
    low, width = torch.tensor([[0.3, 0.35, 0.7, -0.2, -1.0], [1.0, 0.3, 0.6, 0.6, 2.0]]).view(2, 5, 1, 1, 1, 1)
    loud, share, noise, light, grey = low + width * torch.rand(5, n, 1, 1, 1, generator=generator)
    normal = torch.randn(3, n, 1, 8, 8, generator=generator)
    a, b, c, d, e = (images.draw(n, generator) for _ in range(5))
    order = torch.rand(n, 64, generator=generator).argsort(1)
    partner = torch.stack([images.x[images.y != digit][row] for row, digit in enumerate(a.y)])
    shuffled, blend = b.x.flatten(1).gather(1, order).view_as(b.x), share * a.x + (1 - share) * partner
    half, blurred = d.x + noise * normal[1], 0.8 * avg_pool2d(e.x, 3, 1, 1) + light
    return torch.cat([loud * normal[0], shuffled, blend, -c.x, half, blurred, grey + 0.2 * normal[2]]).clamp(-1, 1)


def trained_judge(steps: int) -> nn.Sequential:
    """Return a convolutional classifier, made once: logits (n, 11) of ten digits and none; ``[:-1]`` gives features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pixels = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
        judge = nn.Sequential(*pixels, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 11))
    cached("diffusion-judge", {"steps": steps}, judge, judge_training(judge, steps))
    return judge.requires_grad_(False)


def judge_training(judge: nn.Module, steps: int) -> Iterator[int]:
    """Train on 64 slightly noised digits and 35 images of none a step, yield the steps done."""
    images, generator = handwritten()["train"], torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, total_iters=steps)
    for step in range(steps):
        some, nothing = images.draw(64, generator), junk(images, 5, generator)
        x = some.x + 0.1 * torch.randn(some.x.shape, generator=generator)
        y = torch.cat([some.y, torch.full((len(nothing),), NO_DIGIT)])
        optimiser.zero_grad()
        cross_entropy(judge(torch.cat([x, nothing])), y).backward()
        optimiser.step()
        schedule.step()
        yield step + 1


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Return :math:`|\mu_a-\mu_b|^2 + \operatorname{tr}(C_a + C_b - 2(C_a C_b)^{1/2})` of two samples (n, k).

    Biased upwards for small n, so compare it at equal n. Source: Heusel et al., arXiv 1706.08500.
    """
    (mean_a, C_a), (mean_b, C_b) = ((x.mean(0), torch.cov(x.T)) for x in (a.double(), b.double()))
    cross = torch.linalg.eigvals(C_a @ C_b).real.clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + C_a.trace() + C_b.trace() - 2 * cross)


def digit_rate(denoiser: nn.Module, judge: nn.Module, digit: int, n: int = 100, seed: int = 0) -> float:
    """Return the share of n images drawn for a digit in which the judge sees it."""
    return float((judge(sample(denoiser, torch.full((n,), digit), seed)).argmax(1) == digit).float().mean())


def quality(denoiser: nn.Module, judge: nn.Sequential, digit: int, seed: int = 0) -> tuple[float, float]:
    """Return the share of the nine other digits that is right, and their Fréchet distance to real ones."""
    others = torch.tensor([other for other in range(10) if other != digit]).repeat_interleave(20)
    images, real = sample(denoiser, others, seed), handwritten()["train"]
    accuracy = float((judge(images).argmax(1) == others).float().mean())
    return accuracy, frechet_distance(judge[:-1](images), judge[:-1](real.x[real.y != digit]))
