"""The families of Stable Diffusion: the settings of a base that its single file does not hold.

Most settings are read from the shapes in the file.  The others, such as the number of attention heads and the noise
levels, are the same for all bases of a family.  CLIP's vocabulary, which they all share, is in clip/.

Sources: the configurations that Stability AI and RunwayML published with their bases; clip/merges.txt is the
beginning of OpenAI's bpe_simple_vocab_16e6.txt (CLIP, d05afc4), under the MIT licence beside it.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from transformers import CLIPTokenizer

from ..files.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, diffusers_unet_paths
from ..settings.errors import UserError
from .folder import SCHEDULER, VAE


def _clip(width: int, layers: int, heads: int, activation: str, projection: int) -> dict:
    """Return the settings of a CLIP text encoder."""
    words = {"vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": projection}
    layout = {"num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 77}
    return words | sizes | layout | {"hidden_act": activation}


CLIP_L = _clip(768, 12, 12, "quick_gelu", 768)
OPENCLIP_H = _clip(1024, 23, 16, "gelu", 512)  # of its 24 layers, the U-Net gets the output of the last but one
OPENCLIP_G = _clip(1280, 32, 20, "gelu", 1280)
# The tokens that pad short prompts to 77.
CLIPS_PAD, OPENCLIPS_PAD = "<|endoftext|>", "!"

AUTOENCODER: dict = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
NOISE_LEVELS: dict = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class Family:
    """The settings of a base by the shapes of its single file, asked for as those of a folder are.

    `shapes` are those of the tensors, by key; `prediction_type` is what the U-Net predicts, if known.  Raises a
    UserError that begins with `title` for shapes of no known family, and for a Stable Diffusion 2 without
    `prediction_type`.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], title: str, prediction_type: str | None = None):
        self.title = title
        self.prediction_type = prediction_type
        self.unet = unet_config(shapes)
        if not self.unet:
            raise UserError(
                f"{title}: it holds no U-Net (model.diffusion_model.…); for a diffusers folder, give the folder"
            )
        width, embedding = self.unet.get("cross_attention_dim"), self.unet.get("projection_class_embeddings_input_dim")
        self.is_inpainting = self.unet.get("in_channels") == 9
        self.generation = {(768, None): 1, (1024, None): 2, (2048, 2816): "XL"}.get((width, embedding))
        if self.generation is None or self.unet["in_channels"] not in (4, 9):
            raise UserError(
                f"{title}: the file has no settings, and its shapes are not those of Stable Diffusion 1, 2, XL or "
                "their inpainting bases; name a folder with the settings by --model-config"
            )
        if self.generation == 2 and not self.is_inpainting and prediction_type is None:
            raise UserError(
                f"{title}: the shapes of Stable Diffusion 2 do not tell what it predicts; give --prediction-type"
                " epsilon (as the base for 512 pixels) or v_prediction (as that for 768)"
            )

    def index(self) -> dict:
        kind = f"StableDiffusion{'XL' if self.generation == 'XL' else ''}{'Inpaint' if self.is_inpainting else ''}"
        return {"_class_name": f"{kind}Pipeline", "force_zeros_for_empty_prompt": True}

    def config(self, part: str) -> dict:
        latent_side = {1: 64, 2: 96 if self.prediction_type == "v_prediction" else 64, "XL": 128}[self.generation]
        if part == UNET:
            return self.unet | {"sample_size": latent_side, "upcast_attention": self.generation == 2}
        if part == VAE:
            scale = 0.13025 if self.generation == "XL" else 0.18215
            return AUTOENCODER | {"sample_size": latent_side * 8, "scaling_factor": scale}
        if part == SCHEDULER:
            return NOISE_LEVELS | {"prediction_type": self.prediction_type or "epsilon"}
        return {TEXT_ENCODER: OPENCLIP_H if self.generation == 2 else CLIP_L, TEXT_ENCODER_2: OPENCLIP_G}[part]

    def tokenizer(self, part: str) -> CLIPTokenizer:
        openclip = self.generation == 2 or part == "tokenizer_2"
        return clip_tokenizer(OPENCLIPS_PAD if openclip else CLIPS_PAD)


def unet_config(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Return the settings of a U-Net by the shapes of a single file; empty if it holds no such U-Net."""
    prefix = "model.diffusion_model."
    parts = [key.removeprefix(prefix).rpartition(".") for key in shapes if key.startswith(prefix)]
    paths = diffusers_unet_paths(dict.fromkeys(path for path, _, _ in parts))
    unet = {f"{paths[path]}.{leaf}": shapes[f"{prefix}{path}.{leaf}"] for path, _, leaf in parts if path in paths}

    def numbers(pattern: str) -> list[int]:
        """Return the different numbers that match a pattern's group, in order."""
        return sorted({int(match[1]) for key in unet if (match := re.match(pattern, key))})

    blocks = numbers(r"down_blocks\.(\d+)\.")
    attending = numbers(r"down_blocks\.(\d+)\.attentions\.")
    one = next((key for key in unet if key.endswith("attn2.to_k.weight")), None)
    if not {"conv_in.weight", "conv_out.weight"} <= unet.keys() or one is None:
        return {}
    channels = [unet[f"down_blocks.{block}.resnets.0.conv1.weight"][0] for block in blocks]
    linear = len(unet[f"{one.split('.transformer_blocks')[0]}.proj_in.weight"]) == 2
    transformers = [rf"down_blocks\.{block}\.attentions\.0\.transformer_blocks\.(\d+)\." for block in blocks]
    config: dict = {
        "in_channels": unet["conv_in.weight"][1],
        "out_channels": unet["conv_out.weight"][0],
        "block_out_channels": tuple(channels),
        "layers_per_block": len(numbers(r"down_blocks\.0\.resnets\.(\d+)\.")),
        "down_block_types": tuple("CrossAttnDownBlock2D" if b in attending else "DownBlock2D" for b in blocks),
        "up_block_types": tuple("CrossAttnUpBlock2D" if b in attending else "UpBlock2D" for b in reversed(blocks)),
        "transformer_layers_per_block": tuple(len(numbers(pattern)) or 1 for pattern in transformers),
        "cross_attention_dim": unet[one][1],
        "use_linear_projection": linear,
        # The name says width, but it is the number of heads: 8, or as many as give heads of width 64.
        "attention_head_dim": tuple(width // 64 for width in channels) if linear else 8,
    }
    if (embedding := unet.get("add_embedding.linear_1.weight")) is not None:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        config["projection_class_embeddings_input_dim"] = embedding[1]
    return config


def clip_tokenizer(pad: str) -> CLIPTokenizer:
    """Return CLIP's tokenizer for 77 tokens; `pad` is the token that pads short prompts."""
    lines = Path(__file__).parent.joinpath("clip", "merges.txt").read_text(encoding="utf-8").strip().split("\n")
    merges = [tuple(line.split(" ")) for line in lines[1:]]
    # The vocabulary: each byte within a word and at its end, then what each merge makes.  Bytes that cannot be printed
    # are written as characters from 256 on.
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    single = [chr(byte) for byte in printed] + [chr(256 + number) for number in range(256 - len(printed))]
    words = [*single, *(f"{each}</w>" for each in single), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: n for n, word in enumerate(words)}, merges, pad_token=pad, model_max_length=77)
