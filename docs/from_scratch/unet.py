"""The U-Net of Stable Diffusion in plain PyTorch, to be read from top to bottom.

It predicts what is noise in a noisy picture.  Its inputs are

    x       (batch, 4, h, w)            noisy latents: a picture that the VAE made 8 times smaller
    t       (batch,)                    timesteps, 0 to 999: how noisy they are
    text    (batch, tokens, width)      the prompt, as vectors from the text encoder

and its output has the shape of x.  The way down makes the picture smaller and its channels more, the way up does the
reverse, and each step up also gets what the step down at its size computed (the skips, which make the U):

    x ─ conv_in ─ down 0 ─┬─ down 1 ─┬─ down 2 ─┬─ mid ─┬─ up 0 ─┬─ up 1 ─┬─ up 2 ─ norm, conv_out ─ noise
                          │          │          └───────┘        │        │
                          │          └───────────────────────────┘        │
                          └───────────────────────────────────────────────┘

A block is a few pairs of a residual block, where the timestep comes in, and a transformer, where the prompt does.
All modules have the names that they have in diffusers, so the weights of Stable Diffusion 1.x, 2.x and XL, and those of
the bundled miniature, load as they are, and LoRA finds its layers by the same names.

Sources: Ronneberger et al., "U-Net", 2015; Ho et al., "Denoising diffusion probabilistic models", 2020; Rombach et al.,
"High-resolution image synthesis with latent diffusion models", 2022; Podell et al., "SDXL", 2023.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

# --------------------------------------------------------------------------------- the parts of a block


class ResidualBlock(nn.Module):
    """x + two convolutions of x; the embedded timestep is added between them, the same at every place."""

    def __init__(self, channels: int, out: int, time: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-5)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, out)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-5)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (batch, out, h, w)
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Each place asks (q) and takes a mean of values (v), weighted by how well the keys (k) answer.

    Self-attention takes k and v from the picture itself; cross-attention takes them from the prompt.  LoRA usually goes
    into these four matrices.
    """

    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (
            layer(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, n, width / heads)
            for layer, seen in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        mean = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ / √(width / heads)) v
        return self.to_out[0](mean.transpose(1, 2).flatten(2))  # (batch, n, width)


class GEGLU(nn.Module):
    """A linear layer whose one half is a gate for the other."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The same small network at every place."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """The picture looks at itself, then at the prompt, then every place thinks for itself."""

    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, context, heads)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks over the places of a picture, added to the picture."""

    def __init__(self, channels: int, context: int, heads: int, depth: int, groups: int, linear: bool):
        super().__init__()
        self.linear = linear  # 1.x projects by 1 × 1 convolutions, 2.x and XL by linear layers: the same numbers
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        h = as_places(h) if self.linear else as_places(self.proj_in(h))  # (batch, h · w, channels)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, text)
        h = as_picture(self.proj_out(h), x) if self.linear else self.proj_out(as_picture(h, x))
        return x + h  # (batch, channels, h, w)


def as_places(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)  # (batch, h · w, channels)


def as_picture(places: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return places.transpose(1, 2).unflatten(2, like.shape[2:])  # (batch, channels, h, w)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)  # (batch, channels, h / 2, w / 2)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))  # (batch, channels, 2 h, 2 w): each pixel four times


class Embedding(nn.Module):
    """Two linear layers that turn sines into a vector for all residual blocks."""

    def __init__(self, numbers: int, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(numbers, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def sines(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """Return numbers as cosines and sines of `width` / 2 frequencies each, from 1 down to 1 / 10,000; (…, width)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=numbers.device) / (width // 2))
    angles = numbers[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# ------------------------------------------------------------------------------------------- the blocks


class Block(nn.Module):
    """Residual blocks, each followed by a transformer if the block has any, and a change of size at the end."""

    def __init__(self, channels: list[int], out: int, transformer, time: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(n, out, time, groups) for n in channels)
        if transformer:
            self.attentions = nn.ModuleList(transformer() for _ in channels)

    def pairs(self) -> list:
        """Return each residual block with its transformer, or with None."""
        return list(zip(self.resnets, getattr(self, "attentions", [None] * len(self.resnets)), strict=True))


class UNet(nn.Module):
    """The U-Net that a config.json of diffusers describes."""

    def __init__(self, config: dict):
        super().__init__()
        sizes, groups, layers = config["block_out_channels"], config["norm_num_groups"], config["layers_per_block"]
        # (diffusers calls the number of heads `attention_head_dim`.)
        heads, depths = (
            [value] * len(sizes) if isinstance(value, int) else list(value)
            for value in (config["attention_head_dim"], config.get("transformer_layers_per_block", 1))
        )
        self.width, time = sizes[0], 4 * sizes[0]

        def transformer_of(level: int):
            return lambda: Transformer(
                sizes[level],
                config["cross_attention_dim"],
                heads[level],
                depths[level],
                groups,
                config.get("use_linear_projection", False),
            )

        self.conv_in = nn.Conv2d(config["in_channels"], sizes[0], 3, padding=1)
        self.time_embedding = Embedding(sizes[0], time)
        if config.get("addition_embed_type") == "text_time":  # XL: the whole prompt, and sizes in pixels
            self.size_width = config["addition_time_embed_dim"]
            self.add_embedding = Embedding(config["projection_class_embeddings_input_dim"], time)

        self.down_blocks, now, skips = nn.ModuleList(), sizes[0], [sizes[0]]
        for level, kind in enumerate(config["down_block_types"]):
            out = sizes[level]
            transformer = transformer_of(level) if "CrossAttn" in kind else None
            block = Block([now] + [out] * (layers - 1), out, transformer, time, groups)
            skips += [out] * layers
            if level < len(sizes) - 1:
                block.downsamplers = nn.ModuleList([Downsample(out)])
                skips.append(out)
            self.down_blocks.append(block)
            now = out
        self.mid_block = Block([now, now], now, None, time, groups)
        self.mid_block.attentions = nn.ModuleList([transformer_of(-1)()])  # one, between its two residual blocks
        self.up_blocks = nn.ModuleList()
        for number, kind in enumerate(config["up_block_types"]):
            level = len(sizes) - 1 - number
            out = sizes[level]
            transformer = transformer_of(level) if "CrossAttn" in kind else None
            channels = [(now if i == 0 else out) + skips.pop() for i in range(layers + 1)]
            block = Block(channels, out, transformer, time, groups)
            if level > 0:
                block.upsamplers = nn.ModuleList([Upsample(out)])
            self.up_blocks.append(block)
            now = out
        self.conv_norm_out = nn.GroupNorm(groups, sizes[0], eps=1e-5)
        self.conv_out = nn.Conv2d(sizes[0], config["out_channels"], 3, padding=1)

    @classmethod
    def load(cls, folder: Path) -> "UNet":
        """Return the U-Net in the `unet` folder of a base, with its weights in float32."""
        unet = cls(json.loads((folder / "config.json").read_text()))
        unet.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
        return unet

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the prediction, (batch, channels, h, w).

        XL also takes the prompt as one vector, `pooled`, (batch, width), and `sizes`, (batch, 6): height and width of
        the picture, top and left of its crop, height and width of the crop.
        """
        emb = self.time_embedding(sines(timesteps, self.width).to(x.dtype))  # (batch, 4 · width)
        if pooled is not None:
            numbers = sines(sizes, self.size_width).flatten(1).to(x.dtype)  # (batch, 6 · size_width)
            emb = emb + self.add_embedding(torch.cat([pooled, numbers], dim=1))

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for residual, transformer in block.pairs():
                x = residual(x, emb)
                x = transformer(x, text) if transformer else x
                skips.append(x)
            for down in getattr(block, "downsamplers", []):
                x = down(x)
                skips.append(x)
        first, second = self.mid_block.resnets
        x = second(self.mid_block.attentions[0](first(x, emb), text), emb)
        for block in self.up_blocks:
            for residual, transformer in block.pairs():
                x = residual(torch.cat([x, skips.pop()], dim=1), emb)
                x = transformer(x, text) if transformer else x
            for up in getattr(block, "upsamplers", []):
                x = up(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
