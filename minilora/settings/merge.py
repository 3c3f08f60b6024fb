"""The settings of minilora.merge, and their checks."""

from dataclasses import dataclass
from functools import partial

from . import shared
from .base import VersionSettings
from .setting import AT_LEAST_1, Within, option, setting

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # of --dtype, as safetensors files call them

USES = {  # what each use of the command takes, and the settings that have no effect on it
    "a merge": ("BASE LORA[:STRENGTH] …", "rank energy base dialect"),
    "--loras-only": ("LORA[:STRENGTH] …", "undo float64"),
    "--extract": ("BASE TUNED", "base undo float64 allow_unmatched lora_blocks"),
    "--restore": (
        "MERGED UNDO",
        "rank energy base dialect undo float64 allow_unmatched lora_blocks dtype revision variant",
    ),
}

MERGING = "merging into a base"
of_merge = partial(setting, group=MERGING)
of_other = partial(setting, group="instead of merging into a base")


@dataclass(frozen=True)
class MergeConfig(VersionSettings):
    """Every setting of minilora.merge."""

    usage = "BASE LORA[:STRENGTH] … --output OUT"
    examples = (
        "python -m minilora.merge a.safetensors out/fluent:0.8 --output b.safetensors",
        "python -m minilora.merge --loras-only out/a:0.5 out/b --rank 16 \\\n      --output both.safetensors",
    )

    files: tuple[str, ...] = of_merge(
        (),
        "base (diffusers folder, hub id or .safetensors file) and LoRAs, each with a strength if it is not 1",
        "BASE LORA[:STRENGTH] …",
        basic=True,
        bare=True,
    )
    output: str | None = of_merge(None, "file or folder to write, in the layout of the base", "OUT", basic=True)
    overwrite: bool = of_merge(False, "replace what is at --output", basic=True)
    allow_unmatched: bool = of_merge(False, "leave out keys of a LoRA that have no place in the base", basic=True)
    lora_blocks: tuple[str, ...] = shared.lora_blocks(group=MERGING)
    undo: str | None = of_merge(
        None, "also write a file with the original bytes of the changed weights, for --restore", "FILE", basic=True
    )
    dtype: str | None = of_merge(
        None, "number type of the written weights; if not given, that of the input", choices=tuple(DTYPES)
    )
    float64: bool = of_merge(False, "compute in float64 instead of float32")

    loras_only: bool = of_other(
        False, "merge LoRAs into one LoRA, or convert or resize one, without a base: LORA[:STRENGTH] …"
    )
    extract: bool = of_other(False, "write the difference of a base and a fine-tuned one as a LoRA: BASE TUNED")
    restore: bool = of_other(False, "write the base as it was before merging: MERGED UNDO")
    rank: int | None = of_other(None, "rank of the LoRA that --loras-only or --extract writes", "RANK", AT_LEAST_1)
    energy: float | None = of_other(
        None, "instead of --rank: share of each ΔW's sum of squares to keep, 0 to 1", "SHARE", Within(0, 1, above=True)
    )
    base: str | None = of_other(
        None, "base that gives the module names for --loras-only; --dialect kohya needs it", "BASE"
    )
    dialect: str = of_other("diffusers", "dialect of the LoRA file to write", choices=("diffusers", "kohya", "peft"))

    def problems(self, given: set[str]) -> list[str]:
        chosen = [option(name) for name in ("loras_only", "extract", "restore") if getattr(self, name)]
        what = chosen[0] if chosen else "a merge"
        takes, without_effect = USES[what]
        wrong = [f"{' and '.join(chosen)} cannot be combined"] if len(chosen) > 1 else []
        if len(self.files) < (1 if what == "--loras-only" else 2) or ("…" not in takes and len(self.files) > 2):
            wrong.append(f"{what} takes {takes}, not {' '.join(self.files) or 'nothing'}")
        if self.output is None:
            wrong.append("--output is needed: the file or folder to write")
        if self.rank is not None and self.energy is not None:
            wrong.append("--rank and --energy cannot be combined")
        if what == "--extract" and self.rank is None and self.energy is None:
            wrong.append("--extract needs a --rank or an --energy")
        wrong += [f"{option(name)} has no effect on {what}" for name in without_effect.split() if name in given]
        wrong += shared.wrong_blocks(self.lora_blocks)
        if self.dtype and self.undo:
            wrong.append("--undo and --dtype cannot be combined: --undo stores bytes of the original type")
        return wrong
