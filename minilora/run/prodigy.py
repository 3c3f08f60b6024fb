"""Prodigy: AdamW that finds its own learning rate.

Source: Mishchenko and Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", 2023, arXiv:2306.06101,
algorithm 4; with a bias correction, and without γ in s, as the authors recommend for diffusion models.

A step should be about as long as the way.  Let D be how far the first weights x₀ are from the best ones x*: the
largest |x₀ − x*| of all weights.  Nobody knows D, but the gradients tell a number d that is not above it.  With the
gradient g at the weights x, β₃ = √β₂, and γ the learning rate of the settings (usually 1) times Adam's bias correction,
each step does

    r ← β₃ r + γ d² ⟨g, x₀ − x⟩                s ← β₃ s + d² g
    m ← β₁ m + (1 − β₁) d g                    v ← β₂ v + (1 − β₂) d² g²
    x ← x − γ d (m / (√v + d ε) + λ x)         d ← max(d, r / Σ|s|)

Why d ≤ D, for γ = 1: where the loss is convex, ⟨g, x − x*⟩ ≥ 0 at each step.  Added up over the steps, with the factors
that r and s have, this is ⟨s, x₀ − x*⟩ ≥ r, and the left side is at most D Σ|s|.  A γ below 1 makes r and d smaller.

So d begins far too small, is multiplied at each step while the gradients agree, and in the end stands still.  m and v
hold d g and not g, so that they forget the steps of when d was small; m / √v itself has no unit.
"""

import math
from collections.abc import Iterable

import torch

D0 = 1e-6  # where d begins: below every useful rate, as d never falls


class Prodigy(torch.optim.Optimizer):
    """AdamW whose learning rates are factors of the estimate d; there is one d for all parameters.

    `groups` are as torch's optimizers take them.  The estimate has the learning rate of the first group as its γ; that
    of another group only makes its steps longer or shorter.  All state is tensors, so a run goes on from a checkpoint
    exactly, and no step waits for a GPU.
    """

    def __init__(self, groups: Iterable, betas: tuple[float, ...], eps: float, weight_decay: float):
        super().__init__(groups, {"lr": 1.0, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.first = self.param_groups[0]["params"][0]  # its state also has what there is only once
        self.state[self.first] = {name: self.first.new_tensor(value) for name, value in (("d", D0), ("r", 0.0))}
        self.state[self.first]["step"] = torch.tensor(0.0)  # torch leaves what is called so on the CPU

    @property
    def d(self) -> float:
        """Return the estimate, as it is after the last step."""
        return self.state[self.first]["d"].item()

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure, as nothing here has one
        """Change all parameters that have a gradient, then the estimate."""
        d, r, count = (self.state[self.first][name] for name in ("d", "r", "step"))
        (beta1, beta2), beta3 = self.defaults["betas"], math.sqrt(self.defaults["betas"][1])
        count += 1
        # Both averages begin at 0, and √v is too small for longer than m: the first steps would be several times d.
        correction = math.sqrt(1 - beta2 ** count.item()) / (1 - beta1 ** count.item())
        slope, size = torch.zeros_like(r), torch.zeros_like(r)  # d² ⟨g, x₀ − x⟩ and Σ|s|, over all parameters
        for group in self.param_groups:
            length = group["lr"] * correction * d
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                if "s" not in state:
                    state |= {"x0": x.clone()} | {name: torch.zeros_like(x) for name in ("s", "m", "v")}
                x0, s, m, v = (state[name] for name in ("x0", "s", "m", "v"))
                dg = d * x.grad
                slope += d * (dg * (x0 - x)).sum()
                s.mul_(beta3).add_(d * dg)
                size += s.abs().sum()
                m.mul_(beta1).add_(dg, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(dg, dg, value=1 - beta2)
                x -= length * (m / (v.sqrt() + d * group["eps"]) + group["weight_decay"] * x)
        r.mul_(beta3).add_(self.param_groups[0]["lr"] * correction * slope)
        d.copy_(torch.fmax(d, r / size))  # fmax passes over 0 / 0, when no gradient has been above 0 yet
