"""The settings of minilora.merge, and their checks."""

from dataclasses import dataclass

from .setting import AT_LEAST_1, Settings, Within, option, setting
from .shared import MERGING, OTHER

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # of --dtype, as safetensors files call them


@dataclass(frozen=True)
class MergeConfig(Settings):
    """Every setting of minilora.merge."""

    usage = "BASE LORA[:STRENGTH] … --output OUT"
    examples = (
        "python -m minilora.merge a.safetensors out/fluent:0.8 --output b.safetensors",
        "python -m minilora.merge --loras-only out/a:0.5 out/b --rank 16 \\\n      --output both.safetensors",
    )

    files: tuple[str, ...] = setting(
        (),
        "base, a diffusers folder, hub id or .safetensors file, and LoRAs, each with a strength if it is not 1",
        group=MERGING,
        metavar="BASE LORA[:STRENGTH] …",
        basic=True,
        bare=True,
    )
    output: str | None = setting(
        None, "file or folder to write, in the layout of the base", group=MERGING, metavar="OUT", basic=True
    )
    overwrite: bool = setting(False, "replace what is at --output", group=MERGING, basic=True)
    allow_unmatched: bool = setting(
        False, "leave out keys of a LoRA that have no place in the base", group=MERGING, basic=True
    )
    undo: str | None = setting(
        None,
        "also write a file with the original bytes of what changes, for --restore",
        group=MERGING,
        metavar="FILE",
        basic=True,
    )
    dtype: str | None = setting(
        None,
        "type of the numbers that are written, if it is not that of what was read",
        group=MERGING,
        choices=tuple(DTYPES),
    )
    float64: bool = setting(False, "compute in float64 instead of float32", group=MERGING)

    loras_only: bool = setting(
        False, "merge LoRAs into one LoRA, without a base: LORA[:STRENGTH] …; one is converted or resized", group=OTHER
    )
    extract: bool = setting(False, "write the LoRA that leads from a base to a tuned one: BASE TUNED", group=OTHER)
    restore: bool = setting(False, "write the base that was merged into: MERGED UNDO", group=OTHER)
    rank: int | None = setting(
        None, "rank of the LoRA that --loras-only or --extract writes", group=OTHER, metavar="RANK", within=AT_LEAST_1
    )
    energy: float | None = setting(
        None,
        "instead of --rank: share of each ΔW's sum of squares to keep, 0 to 1",
        group=OTHER,
        metavar="SHARE",
        within=Within(0, 1, above=True),
    )
    base: str | None = setting(
        None, "base that names the modules for --loras-only, as --dialect kohya needs", group=OTHER, metavar="BASE"
    )
    dialect: str = setting("diffusers", "how a LoRA is written", choices=("diffusers", "kohya", "peft"), group=OTHER)

    def problems(self) -> list[str]:
        chosen = [option(name) for name in ("loras_only", "extract", "restore") if getattr(self, name)]
        what = chosen[0] if chosen else "a merge"
        needed = {"--loras-only": 1}.get(what, 2)
        exact = what in ("--extract", "--restore")
        wrong = [f"{' and '.join(chosen)} cannot be done at once"] if len(chosen) > 1 else []
        if len(self.files) < needed or (exact and len(self.files) > 2):
            names = {"--loras-only": "LORA[:STRENGTH] …", "--extract": "BASE TUNED", "--restore": "MERGED UNDO"}
            wrong.append(
                f"{what} takes {names.get(what, 'BASE LORA[:STRENGTH] …')}, not {' '.join(self.files) or 'nothing'}"
            )
        if self.output is None:
            wrong.append("--output is needed: the file or folder to write")
        if self.rank is not None and self.energy is not None:
            wrong.append("--rank and --energy cannot be given at once")
        if what == "--extract" and self.rank is None and self.energy is None:
            wrong.append("--extract needs a --rank or an --energy")
        only = {"rank": "--loras-only --extract", "energy": "--loras-only --extract", "base": "--loras-only"}
        only |= {"undo": "a merge", "allow_unmatched": "a merge --loras-only", "float64": "a merge"}
        only |= {"dtype": "a merge --loras-only --extract"}
        wrong += [f"{option(k)} has no effect on {what}" for k, w in only.items() if getattr(self, k) and what not in w]
        if self.dtype and self.undo:
            wrong.append("--undo and --dtype cannot be given at once: with other types, there is nothing to put back")
        if self.dialect != "diffusers" and what in ("a merge", "--restore"):
            wrong.append(f"--dialect has no effect on {what}")
        return wrong
