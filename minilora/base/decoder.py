"""Train the VAE's decoder alone, at the end, so that pictures are crisp.

A decoder that minimizes the squared error draws the mean of what it cannot tell, and that is a blur.  So a critic, a
small network that sees patches, learns to tell decoded pictures x̂ from real ones x, and the decoder to pass for real:

    decoder    |x − x̂| + ½ (x − x̂)² + areas + edges + Σ_layers |c(x) − c(x̂)| − w · c(x̂)
    critic     max(0, 1 − c(x)) + max(0, 1 + c(x̂))

c(x) is the critic's judgement, or what one of its layers sees.  The encoder stays as it is, so a U-Net and a LoRA that
know its latents stay valid.  Half of the latents are `redrawn`, as inexact as those that the decoder will be given.

Source: Esser et al., "Taming transformers for high-resolution image synthesis", 2021 (the critic and w); Wang et al.,
"High-resolution image synthesis with conditional GANs", 2018 (the layers of the critic).
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from transformers import CLIPTokenizer

from minilora.data import draws
from minilora.files.tensors import write_tensors

from .fit import embeddings, encode, fit, patch_at
from .parts import make_scheduler
from .pictures import SEED, SIZE, Drawing, as_pixels

OF, STEPS = 10, (7, 5)  # each drawing is drawn again with the last 7 of 10 denoising steps, and with the last 5
GUIDANCE = 2.0
NEW = 0.8  # share of the trained weights in the result; a fifth of the old ones takes back what the critic exaggerated


class Critic(nn.Module):
    """Judges each patch of a picture: above 0 is real, below 0 is decoded."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(6, width, 4, stride=2, padding=1),
                nn.Sequential(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.GroupNorm(8, 2 * width)),
                nn.Sequential(nn.Conv2d(2 * width, 3 * width, 3, padding=1), nn.GroupNorm(8, 3 * width)),
            ]
        )
        self.judge = nn.Conv2d(3 * width, 1, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the judgements, (n, 1, h / 4, w / 4), and what each layer saw; `pixels` are (n, 3, h, w)."""
        details = pixels - F.avg_pool2d(pixels, 5, stride=1, padding=2, count_include_pad=False)
        x, seen = torch.cat([pixels, 4 * details], dim=1), []  # (n, 6, h, w)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            seen.append(x)
        return self.judge(x), seen


@torch.no_grad()
def redrawn(
    drawings: Sequence[Drawing],
    latents: torch.Tensor,
    tokenizer: CLIPTokenizer,
    parts: nn.ModuleDict,
    args: argparse.Namespace,
) -> torch.Tensor:
    """Return drawings' latents after noise and the U-Net's denoising, (len(STEPS), n, 4, 16, 16); kept in --work.

    The U-Net corrects the noise towards what it knows, as when it draws, so these latents have its errors.
    """
    if args.redrawn_state.exists():
        return load_file(args.redrawn_state)["latents"]
    unet, text_encoder = parts["unet"], parts["text_encoder"]
    scheduler = make_scheduler(args.schedule)
    scheduler.set_timesteps(OF)

    every = []
    for steps in STEPS:
        timesteps = scheduler.timesteps[-steps:]
        for start in range(0, len(drawings), 50):
            some = drawings[start : start + 50]
            captions = [f"{drawing.thing.names[0]}, {drawing.style} style" for drawing in some]
            conditioning = embeddings(text_encoder, tokenizer, [""] * len(some) + captions)  # (2n, 32, 192)
            clean = latents[start : start + 50]
            noise = [draws.gaussian(SEED, "redrawn", start + i, clean.shape[1:]) for i in range(len(some))]
            x = scheduler.add_noise(clean, torch.stack(noise).to(clean), timesteps[:1].expand(len(some)))
            for t in timesteps:
                with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
                    without, guided = unet(torch.cat([x, x]), t, conditioning).sample.float().chunk(2)
                x = scheduler.step(without + GUIDANCE * (guided - without), t, x).prev_sample
            every.append(x)
    result = torch.cat(every).unflatten(0, (len(STEPS), len(drawings)))
    write_tensors(args.redrawn_state, {"latents": result.cpu()}, {"start": args.start_content})
    return result


def edges(error: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of neighbouring errors; with 0, edges are where they should be."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def loss_against(
    critic: Critic, decoded: torch.Tensor, real: torch.Tensor, last: nn.Parameter, share: float
) -> torch.Tensor:
    """Return the loss of decoder and critic on pictures, (n, 3, h, w); neither learns from the other's part.

    The critic's judgement counts `share` of the errors, by the gradients at `last`, the decoder's last weight.
    """
    frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    judged, seen = functional_call(critic, frozen, (decoded,))
    of_real, wanted = critic(real)
    of_decoded, _ = critic(decoded.detach())
    error = decoded - real
    near = error.abs().mean() + 0.5 * error.square().mean() + 4 * F.avg_pool2d(error, 8).square().mean()
    near = near + 0.5 * edges(error)
    layers = sum((a.float() - b.detach().float()).abs().mean() for a, b in zip(seen, wanted, strict=True))
    passing = -judged.float().mean()
    by_near, by_passing = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (near, passing))
    weight = share * by_near / (by_passing + 1e-4)
    critical = F.relu(1 - of_real.float()).mean() + F.relu(1 + of_decoded.float()).mean()
    return near + layers + weight * passing + critical


def train_decoder(
    vae: AutoencoderKL,
    parts: nn.ModuleDict,
    drawings: list[Drawing],
    drawn: list[np.ndarray],
    photographs: list[np.ndarray],
    tokenizer: CLIPTokenizer,
    device: torch.device,
    args: argparse.Namespace,
) -> AutoencoderKL:
    """Train the decoder against the critic, every other step on patches; return the VAE with the moving average.

    `parts` are the trained U-Net and text encoder; `drawings` are what they know, `drawn` and `photographs` all else.
    """
    scale = vae.config.scaling_factor
    latents = encode(vae, as_pixels([drawing.pixels for drawing in drawings]).to(device)) * scale
    again = redrawn(drawings, latents, tokenizer, parts, args).cpu() / scale
    torch.manual_seed(SEED)  # the critic's first weights
    critic = Critic()
    trained = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv, "critic": critic})
    vae.requires_grad_(False)
    trained.requires_grad_(True).to(device)

    def loss_at(step: int) -> torch.Tensor:
        count, side = (3, SIZE) if step % 2 else (10, SIZE // 2)  # of each kind
        random = draws.generator(SEED, "decoder", step)
        inexact, squares = [], []
        for _ in range(count):
            number, which = int(random.integers(len(drawings))), int(random.integers(len(STEPS)))
            top, left = (8 * int(random.integers((SIZE - side) // 8 + 1)) for _ in range(2))
            squares.append(drawings[number].pixels[top : top + side, left : left + side])
            rows, columns = (slice(first // 8, (first + side) // 8) for first in (top, left))
            inexact.append(again[which, number, :, rows, columns])
        squares += [patch_at(10**7 + step * 16 + i, side, drawn, photographs) for i in range(count)]
        real = as_pixels(squares).to(device)  # (2 · count, 3, side, side)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            with torch.no_grad():
                posterior = vae.encode(real[count:]).latent_dist
            noise = torch.stack(
                [draws.gaussian(SEED, "decoder", step * 16 + i, posterior.mean[0].shape) for i in range(count)]
            )
            spread = posterior.std + 0.2 * float(random.random()) * posterior.mean.std()
            exact = posterior.mean + spread * noise.to(device)
            decoded = vae.decode(torch.cat([torch.stack(inexact).to(device), exact.float()])).sample.float()
            # The critic counts half as much as the errors, after a warm-up.
            share = 0.5 * min(1.0, step / 200)
            return loss_against(critic, decoded, real, vae.decoder.conv_out.weight, share)

    result = {name: x.clone() for name, x in vae.state_dict().items()}
    average = fit(trained, loss_at, args.decoder_steps, 3e-4, args.decoder_state, args.start_content)
    for name, x in average.state_dict().items():
        if name in result:  # not the critic's
            result[name].lerp_(x, NEW)
    vae.load_state_dict(result)
    return vae.eval()
