"""A base: a Stable Diffusion of any family, and what it does with its parts (parts.py).

The families differ in what the U-Net predicts (v in 2.x for 768 pixels, the noise in the others) and in its
conditioning:

    1.x, 2.x       the output of the last layer of one text encoder
    XL             the outputs of the last layer but one of two text encoders, side by side; one vector for the whole
                   prompt from the second encoder; the size of the picture, and place and size of the crop
    inpainting     of any family; the U-Net also gets a mask (1 channel) and the masked picture (4 channels)
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Self

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..diffusion import Conditioning, Schedule
from ..files.names import UNET
from ..settings.base import named_base
from ..settings.errors import UserError
from .fingerprint import fingerprint, hash_of_files
from .folder import SCHEDULER, VAE, loading, say_once
from .parts import LoadedParts
from .text import encode_tokens

_NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class Base(LoadedParts):
    """The base of a name, as LoadedParts takes it: it encodes pictures and prompts, and decodes latents."""

    @classmethod
    def of(cls, config, device: torch.device, precision: str = "fp32", loras: Sequence[str] = ()) -> Self:
        """Return the base that a command's settings name; if they leave that to a LoRA, print its name."""
        options = config.base_settings()
        name, settings = options.pop("model"), options.pop("model_config")
        named = named_base(getattr(config, "lora", None))
        by_lora = name and named and name == named.settings.get("model")
        if by_lora:
            say_once(f"note: the base is {name}, by {named.by}")
        try:
            return cls(name, device, precision, settings, loras=loras, **options)
        except UserError as error:
            if not by_lora:
                raise
            raise UserError(f"{error}; {named.by} names this base; give another with --model") from error

    @property
    def computes(self) -> str:
        """The number format and the device, in the words that commands print: "fp32 on cpu (the base is small)"."""
        precision, why = self._precision
        return f"{precision} on {self.device.type}" + (f" ({why})" if why else "")

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule.of(self.scheduler).to(self.device)

    @property
    def predicts(self) -> str:
        """What the U-Net predicts, in the words that commands print: "v_prediction (marked in the file)"."""
        known = " (marked in the file)" if self.parts.marked_prediction_type else ""
        known = " (--prediction-type)" if self.prediction_type else known
        terminal = " with zero terminal SNR" if self.scheduler.config.rescale_betas_zero_snr else ""
        return f"{self.schedule.prediction_type}{terminal}{known}"

    @property
    def is_inpainting(self) -> bool:
        return "Inpaint" in self.kind

    def refuse_inpainting(self) -> None:
        """Raise UserError for an inpainting base: its U-Net also needs a picture and a mask."""
        if self.is_inpainting:
            raise UserError(
                f"--model {self.source}: it is an inpainting base; use the ordinary base of its family, whose LoRAs fit"
            )

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline of these parts, not of copies."""
        tokenizers = [part.replace("text_encoder", "tokenizer") for part in self.text_parts]
        parts = {name: getattr(self, name) for name in (UNET, VAE, SCHEDULER, *self.text_parts, *tokenizers)}
        others = {"force_zeros_for_empty_prompt": self.index.get("force_zeros_for_empty_prompt", True)}
        pipeline = getattr(diffusers, self.kind)(**parts, **(others if self.is_xl else _NO_CHECKER))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    def encoder_fingerprints(self) -> tuple[str, str]:
        """Return a hash of the VAE, and one of the text encoders and tokenizers: all that encoding depends on."""
        of_text = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            words = json.loads(tokenizer.backend_tokenizer.to_str())
            words = {key: value for key, value in words.items() if key not in ("padding", "truncation")}
            of_text.append(fingerprint(encoder, json.dumps(words)))
        return fingerprint(self.vae), "+".join(of_text)

    @cached_property
    def content(self) -> str:
        """A hash of all that its pictures depend on: its files, or name and commit on the hub; schedule; LoRAs."""
        sources = [(self._source(part), part) for part in (UNET, VAE, *self.text_parts)]
        files = {file.path: file for source, part in sources for file in source.files(part)}
        more = [source.commit for source, _ in sources]
        more += [self.schedule.prediction_type, str(self.schedule.alphas_cumprod[-1].item())]
        for lora, strength, _ in self._read_loras:
            for name, delta in lora.deltas.items():
                numbers = hashlib.sha256(delta.A.tobytes() + delta.B.tobytes()).hexdigest()
                more += [name, str(delta.scale * strength), numbers]
        return hash_of_files(files.values(), *more)

    def autocast(self) -> torch.autocast:
        """Return a context in which parts of another type accept float32 inputs."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @cached_property
    def pixels_per_latent(self) -> int:
        """The width and height in pixels of one latent; read from the VAE's config, without loading the VAE."""
        config = self.vae_parts.config(VAE)
        with loading(self.vae_parts.title, VAE):
            return 2 ** (len(config["block_out_channels"]) - 1)

    @property
    def resolution(self) -> int:
        """The side of the pictures that this base was made for, in pixels; does not load the U-Net."""
        side = self.parts.config(UNET).get("sample_size")
        if type(side) is not int or side < 1:
            raise UserError(
                f"--model {self.source}: sample_size in its unet's config is {side!r}; it should be a number of latents"
            )
        return side * self.pixels_per_latent

    @property
    def side_multiple(self) -> int:
        """The number of pixels that sides of pictures must be multiples of; diffusers' pipelines want at least 8."""
        return max(8, self.pixels_per_latent)

    @torch.no_grad()
    def encode_picture(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and standard deviation of a picture's latents, scaled so that their variance is about 1.

        `pixels` is (3, h, w) in [-1, 1]; both results are (channels, h', w'), float32, on the CPU.
        """
        posterior = self.vae.encode(pixels[None].to(self.device, self.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return (posterior.mean[0] * scale).float().cpu(), (posterior.std[0] * scale).float().cpu()

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the pictures of latents scaled as by `encode_picture`, (n, 3, h, w) in [-1, 1], on the CPU."""
        pixels = self.vae.decode(latents.to(self.device, self.dtype) / self.vae.config.scaling_factor).sample
        return pixels.float().clamp(-1, 1).cpu()

    def tokens(self, prompt: str) -> torch.Tensor:
        """Return the token ids of a prompt for each text encoder, (encoders, tokens)."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return torch.cat([tokenizer(prompt, **options).input_ids for tokenizer in self.tokenizers])

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Conditioning:
        """Return the conditioning of a prompt, float32, on the CPU; a batch of one, without sizes."""
        conditioning = encode_tokens(self.text_encoders, self.tokens(prompt)[None].to(self.device))
        pooled = None if conditioning.pooled is None else conditioning.pooled.float().cpu()
        return Conditioning(conditioning.text.float().cpu(), pooled)

    def encode_text(self, prompt: str) -> torch.Tensor:
        """Return the encoded prompt, (tokens, width), float32, on the CPU.

        Raises UserError for Stable Diffusion XL, whose U-Net also needs other conditioning.
        """
        if self.is_xl:
            raise UserError(f"--model {self.source}: this is for Stable Diffusion 1.x and 2.x, not for XL")
        return self.encode_prompt(prompt).text[0]
