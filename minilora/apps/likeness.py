"""How alike pictures are: by their pixels, by features of the VAE's encoder, and as distributions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image

from ..data.pictures import as_tensor
from ..models.base import Base

TOGETHER = 8  # pictures encoded in one pass


def pixels_of(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Return pictures of one size as float32 in [-1, 1], (n, 3, h, w)."""
    return torch.stack([as_tensor(picture) for picture in pictures])


def through_vae(base: Base, pixels: torch.Tensor) -> torch.Tensor:
    """Return pictures, (n, 3, h, w), encoded and decoded by the VAE."""
    return torch.cat([base.decode_latents(base.encode_picture(picture)[0][None]) for picture in pixels])


def psnr(one: torch.Tensor, two: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of pictures in [-1, 1], (…, 3, h, w), in dB; a mean over the pictures."""
    errors = (one - two).square().mean((-3, -2, -1))
    return (10 * torch.log10(4 / errors)).mean().item()  # 4: the square of the range


@torch.no_grad()
def encoder_features(base: Base, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the features of pictures, (n, 3, h, w), in each layer of the VAE's encoder; (n, channels, h', w') each."""
    encoder = base.vae.encoder
    seen = [encoder.conv_in(pixels.to(base.device, base.dtype))]
    for block in encoder.down_blocks:
        seen.append(block(seen[-1]))
    return seen


def pooled(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return each channel's mean and standard deviation over a picture, for all layers; (n, width)."""
    columns = [pool for layer in features for pool in (layer.float().mean((2, 3)), layer.float().std((2, 3)))]
    return torch.cat(columns, dim=1).cpu()


def apart(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the perceptual distances between corresponding pictures of two batches, by their features; (n,).

    As in LPIPS with VGG, the features of each pixel are normalized to length 1; their squared distance is averaged over
    the pixels and summed over the layers.  This returns its square root, because distances add up along a path and
    squares do not.  Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric",
    2018.
    """
    units = [(F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)) for a, b in zip(one, other, strict=True)]
    return torch.stack([(a - b).square().sum(1).mean((1, 2)).cpu() for a, b in units]).sum(0).sqrt()


def distances(base: Base, frames: torch.Tensor) -> list[float]:
    """Return the perceptual distances of neighbouring frames; `frames` are (frames, 3, h, w)."""
    seen = encoder_features(base, frames)
    return apart([layer[:-1] for layer in seen], [layer[1:] for layer in seen]).tolist()


def features_of(base: Base, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Return the pooled features of pictures, (n, width)."""
    parts = [pixels_of(pictures[start : start + TOGETHER]) for start in range(0, len(pictures), TOGETHER)]
    return torch.cat([pooled(encoder_features(base, part)) for part in parts])


def latents_of(base: Base, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Return the latents of pictures as vectors, divided so that distances are root mean squares; (n, numbers)."""
    latents = torch.stack([base.encode_picture(as_tensor(picture))[0].flatten() for picture in pictures])
    return latents / latents.shape[1] ** 0.5


def kernel_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the kernel distance, as in KID, of two sets of features, (n, width) and (m, width).

        MMD² = E k(x, x′) + E k(y, y′) − 2 E k(x, y)        k(x, y) = (⟨x, y⟩ / width + 1)³

    It is estimated without bias, so it can be below 0.
    Source: Bińkowski et al., "Demystifying MMD GANs", 2018.
    """

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3  # (n, m)

    def within(x: torch.Tensor) -> torch.Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))  # of different pictures

    return (within(one) + within(other) - 2 * kernel(one, other).mean()).item()
