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
    inpainting     of any family; the U-Net also gets a mask, 1 channel, and the masked picture, 4 channels

The parts are classes of diffusers and transformers; this file finds, loads and calls them.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

# Set before diffusers is imported: it makes transformers warn about parts that are not used here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..diffusion import Conditioning, Schedule
from ..files.fold import read_for
from ..files.low_rank import combine
from ..files.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from ..files.network import live_modules
from ..files.read import Change, some
from ..files.tensors import PICKLE_HELP, PICKLES, TensorFile, refuse_more_than_memory
from ..lora import inject_lora, lora_layers, remove_lora
from ..settings.errors import UserError, first_line
from ..settings.setting import BUNDLED
from ..settings.shared import path_and_number
from ..settings.strict_json import parse_json

transformers.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()  # our own messages are shorter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIPELINES = {  # the kinds of bases, and their parts besides U-Net, VAE and scheduler
    "StableDiffusionPipeline": ("text_encoder", "tokenizer"),
    "StableDiffusionInpaintPipeline": ("text_encoder", "tokenizer"),
    "StableDiffusionXLPipeline": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    "StableDiffusionXLInpaintPipeline": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
}
_NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class Base:
    """A base by name: None for the bundled one, else a diffusers folder, a hub id or a single .safetensors file.

    A single file has weights only.  What else there is to know, the parts' settings and the tokenizer, is
    taken from `config`, a diffusers folder (which may lack weights) or hub id; if it is not given, from the
    hub id that diffusers knows the file's shapes by.

    `zero_terminal_snr` changes the noise levels so that the last one is pure noise, ᾱ = 0, and drawing starts there.
    Source: Lin et al., "Common diffusion noise schedules and sample steps are flawed", 2023.

    `loras`, each "path" or "path:strength", are folded into the weights of each part as it is loaded.

    Each part is loaded on first use, frozen, onto `device` in `dtype`, and stays until `release`.
    Raises UserError if there is no Stable Diffusion under that name, or a LoRA does not fit it.
    """

    def __init__(
        self,
        name: str | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        config: str | None = None,
        zero_terminal_snr: bool = False,
        loras: Sequence[str] = (),
    ):
        self.source = str(BUNDLED if name is None else name)
        self.device = device
        self.dtype = dtype
        self.zero_terminal_snr = zero_terminal_snr
        self.loras = loras
        if Path(self.source).suffix in PICKLES:
            raise UserError(f"--model {self.source}: {PICKLE_HELP}")
        self.is_file = Path(self.source).is_file()
        if self.is_file and Path(self.source).suffix != ".safetensors":
            raise UserError(f"--model {self.source}: a single file must be a .safetensors file")
        if config and not self.is_file:
            raise UserError(
                f"--model-config {config}: --model {self.source} is not a single file, and has its own settings"
            )
        self.configs = (config or _config_of(self.source)) if self.is_file else self.source
        try:
            self.index = DiffusionPipeline.load_config(self.configs)
        except Exception as error:  # as in _loading
            reason = first_line(error)
            if self.is_file:
                raise UserError(
                    f"--model {self.source}: the settings of its parts are not in the file, and {self.configs} cannot "
                    f"be reached; give a folder that has them with --model-config ({reason})"
                ) from error
            raise UserError(
                f"--model {self.source}: neither a diffusers folder (with model_index.json) nor a hub id "
                f"that can be reached ({reason})"
            ) from error
        self.kind = self.index.get("_class_name") if isinstance(self.index, dict) else None
        if self.kind not in list(PIPELINES):
            raise UserError(f"--model {self.source}: it holds a {self.kind}; what is known is {', '.join(PIPELINES)}")

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        return self._load(UNet2DConditionModel, "unet", low_cpu_mem_usage=False)

    @cached_property
    def vae(self) -> AutoencoderKL:
        return self._load(AutoencoderKL, "vae", low_cpu_mem_usage=False)  # which would want accelerate

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        return self._load(CLIPTextModel, "text_encoder")

    @cached_property
    def text_encoder_2(self) -> CLIPTextModelWithProjection:
        return self._load(CLIPTextModelWithProjection, "text_encoder_2")

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return self._tokenizer("tokenizer")

    @cached_property
    def tokenizer_2(self) -> CLIPTokenizer:
        return self._tokenizer("tokenizer_2")

    def _tokenizer(self, part: str) -> CLIPTokenizer:
        with self._loading(part):
            tokenizer = CLIPTokenizer.from_pretrained(self.configs, subfolder=part)
        # If files are missing, transformers makes a tokenizer without words and without a maximum length.
        if tokenizer.vocab_size < 512 or tokenizer.model_max_length > 100_000:  # each byte is a word, and ends one
            raise UserError(f"--model {self.source}: its {part} does not load (no vocabulary, or no model_max_length)")
        return tokenizer

    @cached_property
    def scheduler(self) -> DDIMScheduler:
        options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if self.zero_terminal_snr else {}
        with self._loading("scheduler"):
            scheduler = DDIMScheduler.from_pretrained(self.configs, subfolder="scheduler", **options)
        try:
            Schedule.of(scheduler)
        except ValueError as error:
            raise UserError(f"--model {self.source}: {error}") from error
        if self.zero_terminal_snr and scheduler.config.prediction_type == "epsilon":
            raise UserError(
                f"--zero-terminal-snr: {self.source} predicts epsilon, which says nothing about the picture in pure "
                "noise; it needs a base that predicts v"
            )
        return scheduler

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule.of(self.scheduler).to(self.device)

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline that uses these parts, not copies of them."""
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
                f"--model {self.source}: it paints in pictures; take the ordinary base of its family, whose LoRAs fit"
            )

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [getattr(self, name) for name in PIPELINES[self.kind] if name.startswith("text_encoder")]

    @property
    def tokenizers(self) -> list[CLIPTokenizer]:
        return [getattr(self, name) for name in PIPELINES[self.kind] if name.startswith("tokenizer")]

    @cached_property
    def _of_the_file(self) -> DiffusionPipeline:
        """All the parts of a single file, which diffusers converts as a whole."""
        kind = getattr(diffusers, self.kind)
        options = {} if self.is_xl else _NO_CHECKER
        return kind.from_single_file(self.source, config=self.configs, torch_dtype=self.dtype, **options)

    @contextmanager
    def _loading(self, part: str) -> Iterator[None]:
        """Within the block turn any error of diffusers and transformers, as for a broken file, into a UserError."""
        try:
            yield
        except Exception as error:
            raise UserError(f"--model {self.source}: its {part} does not load ({first_line(error)})") from error

    def _load(self, kind: type, part: str, **options) -> nn.Module:
        about = {"missing_keys": (), "unexpected_keys": ()}
        options |= {"subfolder": part, "torch_dtype": self.dtype, "output_loading_info": True}
        with self._loading(part):
            # Of a folder, the files that are no variant: a variant's name has another dot in it.
            inside = (path for path in (Path(self.configs) / part).glob("*.safetensors") if path.name.count(".") == 1)
            paths = [Path(self.source)] if self.is_file else sorted(inside)
            refuse_more_than_memory(map(TensorFile, paths), self.dtype.itemsize)
            if self.is_file:
                module = getattr(self._of_the_file, part)
            else:
                for index in (Path(self.configs) / part).glob("*.index.json"):  # of weights in several files
                    if any(Path(name).name != name for name in parse_json(index.read_bytes())["weight_map"].values()):
                        raise ValueError(f"{index.name} leads outside its folder")
                module, about = kind.from_pretrained(self.configs, use_safetensors=True, **options)
        # What a file lacks, they make up at random; what it has too much, they pass over.
        if missing := sorted(about["missing_keys"]):
            raise UserError(f"--model {self.source}: the weights of its {part} lack {some(missing)}")
        if more := sorted(about["unexpected_keys"]):
            print(f"warning: --model {self.source}: its {part} does not use {some(more)}", file=sys.stderr)
        self._fold_into(module.requires_grad_(False))
        return module.eval().to(self.device)

    def _fold_into(self, module: nn.Module) -> None:
        """Add what the LoRAs change to the weights of a part, in place: in float32, rounded once to their own type."""
        for full, (_, path, _) in live_modules(module).items() if self.loras else ():
            if full in self._changes:
                weight = module.get_submodule(path).weight
                weight.copy_(weight.float() + torch.from_numpy(self._changes[full].delta()))
                if not weight.isfinite().all():
                    raise UserError(f"--model {self.source}: {full} is not finite with {', '.join(self.loras)} in it")

    @cached_property
    def _changes(self) -> dict[str, Change]:
        """What the LoRAs change together, by full name; UserError for unmatched keys."""
        parts = {}
        with torch.device("meta"):  # the shapes only: the weights are not needed at once
            with self._loading(UNET):
                settings = UNet2DConditionModel.load_config(self.configs, subfolder=UNET)
                parts[UNET] = UNet2DConditionModel.from_config(settings)
            for part, kind in ((TEXT_ENCODER, CLIPTextModel), (TEXT_ENCODER_2, CLIPTextModelWithProjection)):
                if part in PIPELINES[self.kind]:
                    with self._loading(part):
                        parts[part] = kind(kind.config_class.from_pretrained(self.configs, subfolder=part))
        shapes = {full: shape for full, (_, _, shape) in live_modules(SimpleNamespace(**parts)).items()}
        given = [(Path(path), strength) for path, strength in map(path_and_number, self.loras)]
        loras = [(read_for(path, shapes, self.source, allow_unmatched=False), strength) for path, strength in given]
        return combine(loras).changes

    @cached_property
    def encoder_fingerprints(self) -> tuple[str, str]:
        """Return hashes of the VAE, and of the text encoders with their tokenizers: all that encoding depends on."""
        of_text = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            words = json.loads(tokenizer.backend_tokenizer.to_str())
            words = {key: value for key, value in words.items() if key not in ("padding", "truncation")}
            of_text.append(fingerprint(encoder, json.dumps(words)))
        return fingerprint(self.vae), "+".join(of_text)

    def release(self, *parts: str) -> None:
        """Free the memory of parts; they are loaded again when they are used again."""
        for part in (*parts, "_of_the_file"):
            self.__dict__.pop(part, None)

    def autocast(self) -> torch.autocast:
        """Return a context in which parts of another type accept float32 inputs."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @cached_property
    def pixels_per_latent(self) -> int:
        """The width and height in pixels of one latent; read from the VAE's config, without loading the VAE."""
        with self._loading("vae"):
            return 2 ** (len(AutoencoderKL.load_config(self.configs, subfolder="vae")["block_out_channels"]) - 1)

    @property
    def resolution(self) -> int:
        """The side of the pictures that this base was made for, in pixels."""
        with self._loading(UNET):  # its settings say so: the weights, gigabytes, are not needed for it
            side = UNet2DConditionModel.load_config(self.configs, subfolder=UNET).get("sample_size")
        if type(side) is not int or side < 1:
            raise UserError(
                f"--model {self.source}: sample_size in its unet's config is {side!r}; it should be a number of latents"
            )
        return side * self.pixels_per_latent

    @property
    def side_multiple(self) -> int:
        """The number that sides of pictures, in pixels, must be multiples of; diffusers' pipelines want at least 8."""
        return max(8, self.pixels_per_latent)

    @torch.no_grad()
    def encode_picture(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of a picture's latents, multiplied so that their variance is about 1.

        `pixels` is (3, h, w) in [-1, 1]; both results are (channels, h', w'), float32, on the CPU.
        """
        posterior = self.vae.encode(pixels[None].to(self.device, self.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return (posterior.mean[0] * scale).float().cpu(), (posterior.std[0] * scale).float().cpu()

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the pictures of latents as from `encode_picture`, (n, 3, h, w) in [-1, 1], on the CPU."""
        pixels = self.vae.decode(latents.to(self.device, self.dtype) / self.vae.config.scaling_factor).sample
        return pixels.float().clamp(-1, 1).cpu()

    def tokens(self, prompt: str) -> torch.Tensor:
        """Return the numbers of a prompt's tokens for each text encoder, (encoders, tokens)."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return torch.cat([tokenizer(prompt, **options).input_ids for tokenizer in self.tokenizers])

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Conditioning:
        """Return the conditioning of a prompt, float32, on the CPU; a batch of one, without sizes."""
        conditioning = encode_tokens(self.text_encoders, self.tokens(prompt)[None].to(self.device))
        pooled = None if conditioning.pooled is None else conditioning.pooled.float().cpu()
        return Conditioning(conditioning.text.float().cpu(), pooled)

    def encode_text(self, prompt: str) -> torch.Tensor:
        """Return the vectors of a prompt, (tokens, width), float32, on the CPU.

        Raises UserError for Stable Diffusion XL, whose U-Net needs other conditioning, too.
        """
        if self.is_xl:
            raise UserError(f"--model {self.source}: this is for Stable Diffusion 1.x and 2.x, not for XL")
        return self.encode_prompt(prompt).text[0]

    def cut_off(self, prompt: str) -> str:
        """Return the end of a prompt that is too long for a text encoder; "" if it fits."""
        ends = [""]
        for tokenizer in self.tokenizers:
            places = tokenizer(prompt, return_offsets_mapping=True, verbose=False).offset_mapping
            if len(places) > tokenizer.model_max_length:  # the last token is the end mark
                ends.append(prompt[places[tokenizer.model_max_length - 1][0] :])
        return max(ends, key=len)

    def warn_of_cuts(self, texts: Iterable[str], what: str) -> None:
        """Print one warning for all texts that are too long for a text encoder, with what it does not see."""
        if ends := [end for text in texts if (end := self.cut_off(text))]:
            shown = ends[0] if len(ends[0]) <= 60 else f"{ends[0][:60]}…"
            these = f"{len(ends)} {what}s" if len(ends) > 1 else f"a {what}"
            print(
                f"warning: the text encoder sees only the beginning of {these}; it sees nothing of "
                f"“…{shown}”{', as in the first of them' if len(ends) > 1 else ''}",
                file=sys.stderr,
            )


def encode_tokens(text_encoders: list[nn.Module], tokens: torch.Tensor, sizes=None) -> Conditioning:
    """Return the conditioning of tokens, (batch, encoders, tokens)."""
    if len(text_encoders) == 1:
        return Conditioning(text_encoders[0](tokens[:, 0]).last_hidden_state)
    seen = [encoder(tokens[:, i], output_hidden_states=True) for i, encoder in enumerate(text_encoders)]
    text = torch.cat([one.hidden_states[-2] for one in seen], dim=-1)  # (batch, tokens, width + width)
    return Conditioning(text, seen[-1].text_embeds, sizes)


@dataclass(frozen=True)
class Tokens:
    """The conditioning if the text encoders are trained, too: captions as tokens, not yet encoded."""

    tokens: torch.Tensor  # (batch, encoders, tokens)
    sizes: torch.Tensor | None = None  # (batch, 6), as in Conditioning

    def inputs(self) -> dict:
        """Return it as the keyword arguments of UNetWithText."""
        return {"tokens": self.tokens, "sizes": self.sizes}


class UNetWithText(nn.Module):
    """A U-Net and its text encoders as one network, so that gradients flow from the U-Net into the encoders."""

    def __init__(self, base: Base):
        super().__init__()
        self.unet = base.unet
        for name, encoder in zip((TEXT_ENCODER, TEXT_ENCODER_2), base.text_encoders, strict=False):
            self.add_module(name, encoder)

    def text_encoders(self) -> list[nn.Module]:
        return [child for name, child in self.named_children() if name != UNET]

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor, sizes=None):
        conditioning = encode_tokens(self.text_encoders(), tokens, sizes)
        return self.unet(x, timesteps, **conditioning.inputs())

    def inject(self, *args, **kwargs) -> None:
        """Call `inject_lora` on each text encoder."""
        encoders = self.text_encoders()
        for encoder in encoders:
            inject_lora(encoder, *args, **kwargs)
        if len(encoders) > 1:
            # The U-Net of XL gets the last layer but one of the first encoder, so the last layer has no gradient.
            last = f"layers.{encoders[0].config.num_hidden_layers - 1}"
            [behind] = [child for path, child in encoders[0].named_modules() if path.endswith(last)]
            if lora_layers(behind):
                remove_lora(behind)


def _config_of(path: str) -> str:
    """Return the hub id of the base whose shapes a single file has, by diffusers' table."""
    return fetch_diffusers_config(TensorFile(Path(path)).entries)["pretrained_model_name_or_path"]


_ABOUT_THE_FILE = ("transformers_version", "dtype", "torch_dtype", "architectures")


def fingerprint(module: nn.Module, *more: str) -> str:
    """Return a hash of a module's config, of its state (names, types, shapes, numbers), and of `more`."""
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    # Left out is what does not change the results: the folder, the version and the type that it was loaded as.
    computing = {key: value for key, value in config.items() if not key.startswith("_") and key not in _ABOUT_THE_FILE}
    digest = hashlib.sha256("\0".join((json.dumps(computing, sort_keys=True, default=str), *more)).encode())

    def hashed(named: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = named
        digest = hashlib.sha256(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.digest()

    with ThreadPoolExecutor() as pool:  # a base has gigabytes, and one thread hashes about one GB/s
        for one in pool.map(hashed, sorted(module.state_dict().items())):
            digest.update(one)
    return digest.hexdigest()
