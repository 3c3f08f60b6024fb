"""A small classifier of pictures, trained when it is needed."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from ..data import draws

STEPS, TOGETHER = 600, 64


def train_classifier(pixels: torch.Tensor, kinds: torch.Tensor, seed: int = 0) -> nn.Module:
    """Train a network that maps pictures, (n, 3, h, w) in [-1, 1], to the logits of their kinds, (n, kinds).

    `pixels` and `kinds`, (n,), numbered from 0, are the training set.
    """
    widths = (3, 16, 32, 64, 64)
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], int(kinds.max()) + 1)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    for step in range(STEPS):
        random = draws.generator(seed, "classifier", step)
        chosen = torch.from_numpy(random.integers(len(pixels), size=TOGETHER))
        batch = pixels[chosen]
        batch = batch.flip(-1) if random.random() < 0.5 else batch
        # With noise and shifts it learns shapes, not single pixels.
        batch = torch.roll(batch, tuple(random.integers(-4, 5, size=2)), dims=(2, 3))
        batch = batch + 0.05 * draws.gaussian(seed, "classifier noise", step, tuple(batch.shape))
        F.cross_entropy(model(batch), kinds[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def probability(model: nn.Module, pixels: torch.Tensor, kind: int) -> torch.Tensor:
    """Return the probability that each picture is of a kind; (n,)."""
    return model(pixels).softmax(1)[:, kind]


@torch.no_grad()
def share_right(model: nn.Module, pixels: torch.Tensor, kinds: torch.Tensor) -> float:
    """Return the share of pictures whose kind is recognized."""
    return (model(pixels).argmax(1) == kinds).float().mean().item()
