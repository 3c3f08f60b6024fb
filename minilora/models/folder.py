"""A diffusers folder or hub id: each part of a base in a sub-folder, its settings beside its weights."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..files.from_hub import variant_of
from ..files.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from ..files.tensors import TensorFile, refuse_more_than_memory
from ..settings.errors import UserError, first_line, some
from ..settings.strict_json import parse_json

transformers.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()  # our own messages are shorter

VAE, SCHEDULER = "vae", "scheduler"
KINDS = {
    UNET: UNet2DConditionModel,
    VAE: AutoencoderKL,
    TEXT_ENCODER: CLIPTextModel,
    TEXT_ENCODER_2: CLIPTextModelWithProjection,
}


class Folder:
    """A diffusers folder or hub id; `title` is its name in messages.

    `subfolders` locates parts that are not in the sub-folder of their own name.  `revision` is the branch, tag or
    commit of a hub id.  `variant` is that of the weights; without it, one is chosen if there are only variants.
    """

    # Only single files have marks; they say what the U-Net predicts, and whether ᾱ ends at 0.
    marked_prediction_type: str | None = None
    marked_zero_terminal_snr = False

    def __init__(
        self,
        name: str,
        title: str,
        subfolders: dict[str, str] | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ):
        self.name = name
        self.title = title
        self.subfolders = subfolders or {}
        self.revision = revision
        self.variant = variant

    def index(self) -> dict:
        """Return the content of model_index.json: the pipeline and its parts."""
        try:
            return DiffusionPipeline.load_config(self.name, revision=self.revision)
        except Exception as error:  # as in loading
            raise UserError(
                f"{self.title}: neither a diffusers folder (with model_index.json) nor a hub id that can be reached "
                f"({first_line(error)})"
            ) from error

    def config(self, part: str) -> dict:
        """Return the settings of the U-Net, the VAE, a text encoder or the scheduler."""
        with loading(self.title, part):
            where = {"subfolder": self._subfolder(part), "revision": self.revision}
            if part in (UNET, VAE, SCHEDULER):
                config = KINDS.get(part, DDIMScheduler).load_config(self.name, **where)
                if not isinstance(config, dict):
                    raise ValueError(f"its settings are {config!r}, not a JSON object")
                return config
            kind = KINDS[part]
            return kind.config_class.from_pretrained(self.name, **where).to_dict()

    def tokenizer(self, part: str) -> CLIPTokenizer:
        with loading(self.title, part):
            return CLIPTokenizer.from_pretrained(self.name, subfolder=self._subfolder(part), revision=self.revision)

    def module(self, part: str, dtype: torch.dtype) -> nn.Module:
        """Load a part, with its numbers in `dtype`.  Raises UserError for weights that lack a tensor, by its name."""
        options = {"subfolder": self._subfolder(part), "revision": self.revision, "torch_dtype": dtype}
        options |= {"use_safetensors": True, "output_loading_info": True}
        # Without low_cpu_mem_usage=False, diffusers would use accelerate; transformers never does.
        options |= {"low_cpu_mem_usage": False} if part in (UNET, VAE) else {}
        load = partial(KINDS[part].from_pretrained, self.name, **options)
        with loading(self.title, part):
            variant = self._variant(part)
            refuse_more_than_memory(sum(file.numbers for file in self.files(part)), dtype.itemsize)
            for index in self._place(part).glob("*.index*.json"):  # of sharded weights
                if any(Path(name).name != name for name in parse_json(index.read_bytes())["weight_map"].values()):
                    raise ValueError(f"{index.name} leads outside its folder")
            try:
                module, about = load(variant=variant)
            except OSError as error:
                if Path(self.name).is_dir() or self.variant:
                    raise
                variant = "fp16"  # the variants of a hub id are not known in advance
                try:
                    module, about = load(variant=variant)
                except OSError:
                    raise error from None  # the first error says what is wrong
        if variant and not self.variant:
            say_once(f"note: {self.title}: its {part} has only the variant {variant}, which is used")
        refuse_missing(self.title, part, about["missing_keys"])
        warn_of_more(self.title, part, about["unexpected_keys"])
        return module

    def files(self, part: str) -> list[TensorFile]:
        """Return the files of a part's weights; none for a hub id."""
        variant = self._variant(part) or ""
        inside = sorted(self._place(part).glob("*.safetensors"))
        return [TensorFile(path) for path in inside if variant_of(path) == variant]

    @property
    def commit(self) -> str:
        """The name and commit of a hub id in the cache; "" for a folder, which is identified by its files."""
        if Path(self.name).is_dir():
            return ""
        files = ("model_index.json", "config.json")
        cached = [try_to_load_from_cache(self.name, name, revision=self.revision) for name in files]
        commits = [Path(path).parent.name for path in cached if isinstance(path, str)]
        return "@".join(filter(None, [self.name, self.variant, *commits]))

    def _variant(self, part: str) -> str | None:
        """Return the variant of a part's weights to load: None, unless only variants exist."""
        if self.variant:
            return self.variant
        found = {variant_of(path) for path in self._place(part).glob("*.safetensors")}
        return None if not found or "" in found else min(found, key=lambda variant: ("ema" in variant, variant))

    def _place(self, part: str) -> Path:
        return Path(self.name) / self._subfolder(part)

    def _subfolder(self, part: str) -> str:
        return self.subfolders.get(part, part)


def empty_module(part: str, config: dict, title: str) -> nn.Module:
    """Return a part made from its settings, with names and shapes but no numbers."""
    kind = KINDS[part]
    with torch.device("meta"), loading(title, part):
        if part in (UNET, VAE):
            return kind.from_config(config)
        return kind(kind.config_class.from_dict(config))


@contextmanager
def loading(title: str, part: str) -> Iterator[None]:
    """Within the block, turn any error, such as diffusers' about a broken file, into a UserError."""
    try:
        yield
    except Exception as error:
        hint = "; --vae takes another" if part == VAE and title.startswith("--model ") else ""
        raise UserError(f"{title}: its {part} does not load ({first_line(error)}){hint}") from error


def refuse_missing(title: str, part: str, missing) -> None:
    """Raise UserError for missing tensors: the libraries would fill them with random numbers."""
    if missing:
        raise UserError(f"{title}: the weights of its {part} lack {some(sorted(missing))}")


def warn_of_more(title: str, part: str, more) -> None:
    if more:
        say_once(f"warning: {title}: its {part} does not use {some(sorted(more))}")


@cache
def say_once(text: str) -> None:
    """Print a line on stderr once, even if a part is loaded several times or by several processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr)
