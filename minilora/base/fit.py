"""Train the parts of the bundled base: the VAE on patches of pictures, then U-Net and text encoder together.

All random draws come from data/draws.py, and the state is saved in --work every 200 steps, so a stopped build resumes
from there.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from minilora.data import draws
from minilora.diffusion import Conditioning, Schedule, denoising_loss
from minilora.files.tensors import write_tensors
from minilora.run.checkpoint import load_optimizer_tensors, optimizer_tensors, under
from minilora.run.ema import ema_update

from .parts import load_vae, make_scheduler, make_text_encoder, make_unet, make_vae
from .pictures import SEED, SIZE, Drawing, as_pixels, caption_at

SAVE_EVERY = 200  # steps


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Warm up over 100 steps, hold, then fall linearly to a fiftieth over the last third."""
    warm_up = min(1.0, (step + 1) / 100)
    fall = min(1.0, 3 * (1 - step / steps))
    return peak * warm_up * max(fall, 0.02)


def fit(
    modules: torch.nn.ModuleDict, loss_at: Callable, steps: int, learning_rate: float, path: Path, start: str
) -> torch.nn.ModuleDict:
    """Train `modules` for `steps` steps of `loss_at(step)` and return their moving average.

    The state is saved in the file `path`, and training resumes from there, even with more `steps`.  `start` identifies
    the first weights; it is saved, too, for build.py.
    """
    average = copy.deepcopy(modules).requires_grad_(False)
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first = 0
    if path.exists():
        state = load_file(path)
        first = int(state.pop("step"))
        modules.load_state_dict(under(state, "now."))
        average.load_state_dict(under(state, "average."))
        load_optimizer_tensors(optimizer, under(state, "adam."))

    recent = None
    progress = tqdm(range(first, steps), initial=first, total=steps, desc=path.stem, mininterval=5)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, learning_rate)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_update(modules, average.state_dict(), step, decay=0.998)
        recent = loss.item() if recent is None else 0.98 * recent + 0.02 * loss.item()
        progress.set_postfix(loss=f"{recent:.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            parts = {"now": modules.state_dict(), "average": average.state_dict(), "adam": optimizer_tensors(optimizer)}
            state = {f"{part}.{name}": x.cpu() for part, tensors in parts.items() for name, x in tensors.items()}
            write_tensors(path, state | {"step": torch.tensor(step + 1)}, {"start": start})
    return average


def patch_at(position: int, side: int, drawn: list[np.ndarray], photographs: list[np.ndarray]) -> np.ndarray:
    """Return the VAE's training square at a position, (side, side, 3); at even positions it is from a drawing."""
    random = draws.generator(SEED, "vae", position)
    if position % 2 == 0:
        picture = drawn[random.integers(len(drawn))]
        if side == SIZE:
            picture = np.roll(picture, random.integers(-8, 9, 2), (0, 1))
    else:
        picture = photographs[random.integers(len(photographs))]
    for _ in range(4):  # a white square teaches nothing, so try other crops
        top, left = (random.integers(n - side + 1) for n in picture.shape[:2])
        patch = picture[top : top + side, left : left + side]
        if side == SIZE or (patch.min(axis=2) < 245).mean() > 0.4:
            break
    if position % 2 and random.random() < 0.5:  # the photographs are few, so their light and colours vary
        patch = (patch * random.uniform(0.6, 1.2)).clip(0, 255).astype(np.uint8)
        patch = patch[..., random.permutation(3)] if random.random() < 0.5 else patch
    return patch[:, ::-1] if random.random() < 0.5 else patch


def train_vae(
    drawn: list[np.ndarray], photographs: list[np.ndarray], device: torch.device, args: argparse.Namespace
) -> AutoencoderKL:
    """Train the autoencoder: every other step on patches of 64 pixels, which cost a quarter and tell nearly as much.

    With `--start`, its VAE is trained further, and the latents of drawings stay where the U-Net knows them.
    """
    torch.manual_seed(SEED)  # the first weights
    vae = load_vae(args.start) if args.start else make_vae()
    first = copy.deepcopy(vae).requires_grad_(False).to(device)  # --start's, whose latents the U-Net knows
    modules = torch.nn.ModuleDict({"vae": vae}).to(device)

    def loss_at(step: int) -> torch.Tensor:
        count, side = (4, SIZE) if step % 2 else (16, SIZE // 2)
        positions = range(step * 16, step * 16 + count)
        patches = [patch_at(p, side, drawn, photographs) for p in positions]
        pixels = as_pixels(patches).to(device)  # (count, 3, side, side)
        noise = torch.stack([draws.gaussian(SEED, "posterior", p, (4, side // 8, side // 8)) for p in positions])
        share = torch.tensor([0.3 * draws.uniform(SEED, "share", p) for p in positions]).view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            posterior = vae.encode(pixels).latent_dist
            # More noise than the posterior's: latents that a U-Net draws are never exact, and must not become stains.
            spread = posterior.std + share.to(device) * posterior.mean.detach().std()
            error = vae.decode(posterior.mean + spread * noise.to(device)).sample.float() - pixels
        # Squares of single pixels say little about the colour of an area: with them alone, grass turns grey.
        areas = F.avg_pool2d(error, 8).square().mean()
        # The divergence only keeps the latents from drifting far from a unit gaussian.
        divergence = posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()
        loss = error.square().mean() + 0.1 * error.abs().mean() + 4 * areas + 3e-5 * 0.5 * divergence.mean()
        if args.start and side == SIZE:
            known = first.encode(pixels[::2]).latent_dist.mean  # of the drawings
            loss = loss + 0.05 * (posterior.mean[::2].float() - known).square().mean() / known.var()
        return loss

    learning_rate = 8e-4 if args.start else 1.5e-3
    average = fit(modules, loss_at, args.vae_steps, learning_rate, args.vae_state, args.start_content)
    trained: Any = average["vae"].eval()
    if not args.start:
        # Latents are scaled so that their variance is 1, as in every Stable Diffusion.
        sample = as_pixels(drawn[:: max(1, len(drawn) // 500)]).to(device)
        trained.register_to_config(scaling_factor=round(1 / encode(trained, sample).std().item(), 5))
    return trained


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Return the means of the latents, not multiplied by the scaling factor, (n, 4, 16, 16)."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])


def embeddings(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return the embeddings of captions, (n, 32, 192)."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return text_encoder(tokens.to(text_encoder.device)).last_hidden_state


def train_unet(
    drawings: list[Drawing],
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    device: torch.device,
    args: argparse.Namespace,
) -> torch.nn.ModuleDict:
    """Train text encoder and U-Net together; return the moving averages of both, by the names of the parts."""
    # Each drawing has one place and size: such a small network draws sharply only what it has seen often.
    latents = encode(vae, as_pixels([drawing.pixels for drawing in drawings]).to(device))
    latents = latents * vae.config.scaling_factor  # (drawings, 4, 16, 16)
    torch.manual_seed(SEED)  # the first weights
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    if args.start:
        unet.load_state_dict(load_file(args.start / "unet" / "diffusion_pytorch_model.safetensors"))
        text_encoder.load_state_dict(load_file(args.start / "text_encoder" / "model.safetensors"))
    modules = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(device)
    network = torch.compile(unet) if args.compile else unet
    schedule = Schedule.of(make_scheduler(args.schedule)).to(device)
    batch = 32

    def loss_at(step: int) -> torch.Tensor:
        positions = range(step * batch, (step + 1) * batch)
        shown = [draws.picture_at(SEED, p, len(drawings)) for p in positions]
        captions = [caption_at(drawings[i], p) for i, p in zip(shown, positions, strict=True)]
        noise = torch.stack([draws.gaussian(SEED, "noise", p, latents.shape[1:]) for p in positions])
        # Noisy timesteps, where the text decides what is drawn, come more often: the density is proportional to t.
        timesteps = torch.tensor([int(len(schedule) * draws.uniform(SEED, "timestep", p) ** 0.5) for p in positions])
        # Plain attention: on a CPU its backward pass is faster here than that of fused attention.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            text = Conditioning(embeddings(text_encoder, tokenizer, captions))  # (b, 32, 192)
            clean = latents[shown]  # (b, 4, 16, 16)
            return denoising_loss(network, clean, text, noise.to(device), timesteps.to(device), schedule).mean()

    return fit(modules, loss_at, args.steps, args.learning_rate, args.unet_state, args.start_content).eval()
