"""The parts of a base: found by its name, loaded when first used, with LoRAs folded into their weights.

    tokenizer, text_encoder    a prompt   -> vectors, (tokens, width)
    vae                        a picture <-> latents, 8 times smaller each way (4 in the bundled base)
    unet                       noisy latents, timestep, vectors -> the noise in the latents
    scheduler                  how much noise each timestep has

They are classes of diffusers and transformers; folder.py and single_file.py load them.
"""

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..diffusion import Schedule
from ..files.deltas import LoRA
from ..files.for_base import read_for
from ..files.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from ..files.network import attach_lora, live_modules
from ..lora import lora_layers
from ..settings.errors import UserError
from ..settings.setting import BUNDLED
from ..settings.shared import path_and_number
from .folder import SCHEDULER, VAE, Folder, empty_module, loading
from .precision import DTYPES, choose, slow_precision
from .single_file import SingleFile, is_file, vae_parts

PIPELINES = (  # the kinds of bases
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline",
)


class LoadedParts:
    """The parts of a base by name: None for the bundled one, else a diffusers folder, a hub id or a .safetensors file.

    A single file has only weights.  The parts' settings and the tokenizer come from `config`, a diffusers folder (which
    may lack weights) or hub id; without it, they follow from the file's shapes.  `vae` is another base or VAE to take
    the VAE from.

    The U-Net predicts `prediction_type`; if that is None, what the mark in a single file says, else what the base's
    settings say.  `zero_terminal_snr`, or a file's mark, rescales the noise levels so that the last one is pure noise,
    ᾱ = 0, and drawing starts there.
    Source: Lin et al., "Common diffusion noise schedules and sample steps are flawed", 2023.

    `revision` is the branch, tag or commit of a hub id; `variant` is the variant of the weights there or in a folder.

    `precision` is fp32, bf16, fp16, or auto, which lets precision.py choose.

    `loras`, each "path" or "path:strength", are folded into the weights of each part as it is loaded.

    Each part is loaded on first use, frozen, onto `device` in `precision`, and stays until `release`.
    Raises UserError if there is no Stable Diffusion under that name, or a LoRA does not fit it.
    """

    def __init__(
        self,
        name: str | None,
        device: torch.device,
        precision: str = "fp32",
        config: str | None = None,
        zero_terminal_snr: bool = False,
        loras: Sequence[str] = (),
        prediction_type: str | None = None,
        vae: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ):
        self.source = str(BUNDLED if name is None else name)
        self.device = device
        self.asked_precision = precision
        self.zero_terminal_snr = zero_terminal_snr
        self.loras = loras
        self.prediction_type = prediction_type
        title = f"--model {self.source}"
        self.parts: Folder | SingleFile
        if revision and Path(self.source).exists():
            raise UserError(f"--revision {revision}: {title} is a local file; only a base on the hub has revisions")
        if is_file(self.source):
            if variant:
                raise UserError(f"--variant {variant}: {title} is a single file, which has no variants")
            configs = Folder(config, f"--model-config {config}") if config else None
            self.parts = SingleFile(self.source, title, configs, prediction_type)
        elif config:
            raise UserError(f"--model-config {config}: {title} is not a single file, and has its own settings")
        else:
            self.parts = Folder(self.source, title, revision=revision, variant=variant)
        self.vae_parts = self.parts if vae is None else vae_parts(vae, self.parts)
        self.index = self.parts.index()
        self.kind = self.index.get("_class_name") if isinstance(self.index, dict) else None
        if self.kind not in PIPELINES:
            raise UserError(f"{title}: it holds a {self.kind}; supported are {', '.join(PIPELINES)}")

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        return self._load(UNET)

    @cached_property
    def vae(self) -> AutoencoderKL:
        vae: AutoencoderKL = self._load(VAE)
        own, wanted = vae.config.latent_channels, self.parts.config(UNET).get("out_channels", 4)
        if own != wanted:
            what = f"its latents have {own} channels, and those of --model {self.source} {wanted}"
            raise UserError(f"{self.vae_parts.title}: {what}")
        return vae

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        return self._load(TEXT_ENCODER)

    @cached_property
    def text_encoder_2(self) -> CLIPTextModelWithProjection:
        return self._load(TEXT_ENCODER_2)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return self._tokenizer("tokenizer")

    @cached_property
    def tokenizer_2(self) -> CLIPTokenizer:
        return self._tokenizer("tokenizer_2")

    def _tokenizer(self, part: str) -> CLIPTokenizer:
        tokenizer = self.parts.tokenizer(part)
        # If files are missing, transformers makes a tokenizer without words and without a maximum length.
        # A vocabulary has at least 512 words: each byte, within a word and at its end.
        if tokenizer.vocab_size < 512 or tokenizer.model_max_length > 100_000:
            raise UserError(f"--model {self.source}: its {part} does not load (no vocabulary, or no model_max_length)")
        return tokenizer

    @cached_property
    def scheduler_options(self) -> dict:
        """What the user's settings, or the marks in a file, change in the base's scheduler."""
        predicts = self.prediction_type or self.parts.marked_prediction_type
        options: dict = {"prediction_type": predicts} if predicts else {}
        predicts = predicts or self.parts.config(SCHEDULER).get("prediction_type", "epsilon")
        # (--prediction-type epsilon also overrides a mark of zero terminal SNR.)
        if self.zero_terminal_snr or (self.parts.marked_zero_terminal_snr and predicts != "epsilon"):
            options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return options

    @cached_property
    def scheduler(self) -> DDIMScheduler:
        config = self.parts.config(SCHEDULER)
        with loading(self.parts.title, SCHEDULER):
            scheduler = DDIMScheduler.from_config(config, **self.scheduler_options)
        try:
            Schedule.of(scheduler)
        except ValueError as error:
            raise UserError(f"--model {self.source}: {error}") from error
        if self.zero_terminal_snr and scheduler.config.prediction_type == "epsilon":
            raise UserError(
                f"--zero-terminal-snr: {self.source} predicts epsilon, which tells nothing about the picture in pure "
                "noise; use a base that predicts v"
            )
        return scheduler

    @property
    def is_xl(self) -> bool:
        return "XL" in self.kind

    @property
    def text_parts(self) -> list[str]:
        return [TEXT_ENCODER, TEXT_ENCODER_2] if self.is_xl else [TEXT_ENCODER]

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self.text_parts]

    @property
    def tokenizers(self) -> list[CLIPTokenizer]:
        return [self.tokenizer, self.tokenizer_2] if self.is_xl else [self.tokenizer]

    def release(self, *parts: str) -> None:
        """Free the memory of parts; they are loaded again on their next use."""
        for part in parts:
            self.__dict__.pop(part, None)

    # -------------------------------------------------------------------------------------- loading

    def _source(self, part: str) -> Folder | SingleFile:
        return self.vae_parts if part == VAE else self.parts

    def empty(self, part: str) -> nn.Module:
        """Return a part with names and shapes but no numbers, without loading it."""
        source = self._source(part)
        return empty_module(part, source.config(part), source.title)

    def _load(self, part: str) -> nn.Module:
        module = self._source(part).module(part, self.dtype)
        self._fold_into(part, module.requires_grad_(False))
        return module.eval().to(self.device)

    @torch.no_grad()
    def _fold_into(self, part: str, module: nn.Module) -> None:
        """Merge the LoRAs into the weights of a part permanently; the original weights are not kept."""
        for number, (lora, strength, path) in enumerate(self._read_loras):
            attach_lora(module, lora, f"base{number}", strength, path)
        for path, layer in lora_layers(module).items():
            layer.set_merged({*layer.adapters})
            if not layer.base.weight.isfinite().all():
                raise UserError(
                    f"--model {self.source}: {part}.{path} is not finite after merging {', '.join(self.loras)}"
                )
            module.set_submodule(path, layer.base)

    @cached_property
    def _read_loras(self) -> list[tuple[LoRA, float, str]]:
        """The LoRAs, each with its strength and path.  Raises UserError for keys that match nothing in any part."""
        if not self.loras:
            return []
        empty = {part: self.empty(part) for part in (UNET, *self.text_parts)}
        shapes = live_modules(SimpleNamespace(**empty))
        given = [path_and_number(text) for text in self.loras]
        return [(read_for(Path(path), shapes, self.source, False), strength, path) for path, strength in given]

    # ------------------------------------------------------------------------------------- precision

    @cached_property
    def parameters(self) -> int:
        """The number of parameters of the U-Net; known without loading it."""
        return sum(parameter.numel() for parameter in self.empty(UNET).parameters())

    @cached_property
    def _precision(self) -> tuple[str, str]:
        """The number format to compute in, and the reason if it was chosen automatically."""
        if self.asked_precision == "fp32":
            return "fp32", ""
        if self.asked_precision == "auto":
            return choose(self.device, self.parameters)
        if warning := slow_precision(self.asked_precision, self.device, self.parameters):
            print(f"warning: {warning}", file=sys.stderr)
        return self.asked_precision, ""

    @property
    def precision(self) -> str:
        return self._precision[0]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]
