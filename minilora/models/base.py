"""A base: a Stable Diffusion of any family, its parts loaded when first used.

The parts and what they do:

    tokenizer, text_encoder    a prompt   -> vectors, (tokens, width)
    vae                        a picture <-> latents, 8 times smaller each way (4 in the bundled base)
    unet                       noisy latents, timestep, vectors -> the noise in the latents
    scheduler                  how much noise each timestep has

The families differ in what the U-Net predicts (1.x the noise, 2.x at 768 pixels v) and in its conditioning:

    1.x, 2.x       the output of the last layer of one text encoder
    XL             the outputs of the last layer but one of two text encoders, side by side; one vector for the whole
                   prompt from the second encoder; the size of the picture, and place and size of the crop
    inpainting     of any family; the U-Net also gets a mask (1 channel) and the masked picture (4 channels)

The parts are classes of diffusers and transformers; folder.py and single_file.py load them, and this file uses them.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

from .folder import KINDS, SCHEDULER, VAE, Folder, empty_module, loading, say_once  # isort: skip (before diffusers is imported)

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..diffusion import Conditioning, Schedule
from ..files.deltas import LoRA
from ..files.for_base import read_for
from ..files.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from ..files.network import attach_lora, live_modules
from ..lora import lora_layers
from ..settings.base import named_base
from ..settings.errors import UserError
from ..settings.setting import BUNDLED
from ..settings.shared import path_and_number
from .fingerprint import fingerprint, hash_of_files
from .precision import DTYPES, choose, slow_precision
from .single_file import SingleFile, is_file, vae_parts
from .text import encode_tokens, tokenize

PIPELINES = {  # the kinds of bases, and their parts besides U-Net, VAE and scheduler
    "StableDiffusionPipeline": ("text_encoder", "tokenizer"),
    "StableDiffusionInpaintPipeline": ("text_encoder", "tokenizer"),
    "StableDiffusionXLPipeline": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    "StableDiffusionXLInpaintPipeline": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
}
_NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class Base:
    """A base by name: None for the bundled one, else a diffusers folder, a hub id or a single .safetensors file.

    A single file has only weights.  The parts' settings and the tokenizer come from `config`, a diffusers folder (which
    may lack weights) or hub id; without it, they follow from the file's shapes.  `vae` is another base or VAE to take
    the VAE from.

    The U-Net predicts `prediction_type`, or if that is None, what a single file is marked with or the base's settings
    say.  `zero_terminal_snr`, or a file's mark, rescales the noise levels so that the last one is pure noise, ᾱ = 0,
    and drawing starts there.
    Source: Lin et al., "Common diffusion noise schedules and sample steps are flawed", 2023.

    `revision` is that of a hub id, `variant` that of a hub id or a folder.

    `precision` is fp32, bf16, fp16, or auto for the choice of precision.py.

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
        if self.kind not in list(PIPELINES):
            raise UserError(f"{title}: it holds a {self.kind}; supported are {', '.join(PIPELINES)}")

    @classmethod
    def of(cls, config, device: torch.device, precision: str = "fp32", loras: Sequence[str] = ()) -> "Base":
        """Return the base that a command's settings name; print which one if a LoRA names it."""
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

    @property
    def computes(self) -> str:
        """The number format and the device, in the words that commands print: "fp32 on cpu (the base is small)"."""
        precision, why = self._precision
        return f"{precision} on {self.device.type}" + (f" ({why})" if why else "")

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        return self._load(UNET)

    @cached_property
    def vae(self) -> AutoencoderKL:
        vae: AutoencoderKL = self._load(VAE)
        channels = self.parts.config(UNET).get("out_channels", 4)
        if vae.config.latent_channels != channels:
            what = (
                f"its latents have {vae.config.latent_channels} channels, and those of --model {self.source} {channels}"
            )
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
        if tokenizer.vocab_size < 512 or tokenizer.model_max_length > 100_000:  # 512: every byte, alone and at an end
            raise UserError(f"--model {self.source}: its {part} does not load (no vocabulary, or no model_max_length)")
        return tokenizer

    @cached_property
    def scheduler_options(self) -> dict:
        """How the scheduler differs from the base's settings, by the user's settings or the file's marks."""
        marks = self.parts.marks
        predicts = self.prediction_type or marks.prediction_type
        options: dict = {"prediction_type": predicts} if predicts else {}
        predicts = predicts or self.parts.config(SCHEDULER).get("prediction_type", "epsilon")
        # (--prediction-type epsilon also overrides a mark of zero terminal SNR.)
        if self.zero_terminal_snr or (marks.zero_terminal_snr and predicts != "epsilon"):
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

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule.of(self.scheduler).to(self.device)

    @property
    def predicts(self) -> str:
        """What the U-Net predicts, in the words that commands print: "v_prediction (marked in the file)"."""
        known = " (marked in the file)" if self.parts.marks.prediction_type else ""
        known = " (--prediction-type)" if self.prediction_type else known
        terminal = " with zero terminal SNR" if self.scheduler.config.rescale_betas_zero_snr else ""
        return f"{self.schedule.prediction_type}{terminal}{known}"

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline of these parts, not of copies."""
        parts = {name: getattr(self, name) for name in ("unet", "vae", "scheduler", *PIPELINES[self.kind])}
        others = {"force_zeros_for_empty_prompt": self.index.get("force_zeros_for_empty_prompt", True)}
        pipeline = getattr(diffusers, self.kind)(**parts, **(others if self.is_xl else _NO_CHECKER))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def is_xl(self) -> bool:
        return "XL" in self.kind

    @property
    def is_inpainting(self) -> bool:
        return "Inpaint" in self.kind

    def refuse_inpainting(self) -> None:
        """Raise UserError for an inpainting base: its U-Net also needs a picture and a mask."""
        if self.is_inpainting:
            raise UserError(
                f"--model {self.source}: it is an inpainting base; use the ordinary base of its family, whose LoRAs fit"
            )

    @property
    def text_parts(self) -> list[str]:
        return [name for name in PIPELINES[self.kind] if name in KINDS]

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self.text_parts]

    @property
    def tokenizers(self) -> list[CLIPTokenizer]:
        return [getattr(self, name) for name in PIPELINES[self.kind] if name.startswith("tokenizer")]

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
            layer.base.weight.copy_(layer.weight_with({*layer.adapters}))
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
        shapes = {full: shape for full, (_, _, shape) in live_modules(SimpleNamespace(**empty)).items()}
        given = [path_and_number(text) for text in self.loras]
        return [(read_for(Path(path), shapes, self.source, False), strength, path) for path, strength in given]

    @cached_property
    def encoder_fingerprints(self) -> tuple[str, str]:
        """Return hashes of the VAE, and of the text encoders with their tokenizers: everything encoding depends on."""
        of_text = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            words = json.loads(tokenizer.backend_tokenizer.to_str())
            words = {key: value for key, value in words.items() if key not in ("padding", "truncation")}
            of_text.append(fingerprint(encoder, json.dumps(words)))
        return fingerprint(self.vae), "+".join(of_text)

    @cached_property
    def content(self) -> str:
        """A hash of everything its pictures depend on: files, or name and commit on the hub; schedule; LoRAs."""
        sources = [(self._source(part), part) for part in (UNET, VAE, *self.text_parts)]
        files = {file.path: file for source, part in sources for file in source.files(part)}
        more = [source.commit for source, _ in sources]
        more += [self.schedule.prediction_type, str(self.schedule.alphas_cumprod[-1].item())]
        for lora, strength, _ in self._read_loras:
            for name, delta in lora.deltas.items():
                numbers = hashlib.sha256(delta.A.tobytes() + delta.B.tobytes()).hexdigest()
                more += [name, str(delta.scale * strength), numbers]
        return hash_of_files(files.values(), *more)

    def release(self, *parts: str) -> None:
        """Free the memory of parts; they are loaded again on their next use."""
        for part in parts:
            self.__dict__.pop(part, None)

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
        """Return mean and standard deviation of a picture's latents, scaled so that their variance is about 1.

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
        return tokenize(self.tokenizers, prompt)

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
