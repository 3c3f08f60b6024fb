"""The settings of minilora.merge, and their checks."""

from dataclasses import dataclass

from .setting import AT_LEAST_1, Settings, Within, option, setting
from .shared import MODEL, OTHER, OUTPUT


@dataclass(frozen=True)
class MergeConfig(Settings):
    """Every setting of minilora.merge."""

    files: tuple[str, ...] = setting(
        (), "BASE LORA[:STRENGTH] …, or what the options below say", group=MODEL, bare=True
    )
    allow_unmatched: bool = setting(False, "leave out unmatched keys of a LoRA", group=MODEL)
    float64: bool = setting(False, "compute in float64 instead of float32", group=MODEL)

    loras_only: bool = setting(False, "LORA[:STRENGTH] …: merge LoRAs into one LoRA, without a base", group=OTHER)
    extract: bool = setting(False, "BASE TUNED: write the LoRA that leads from one to the other", group=OTHER)
    restore: bool = setting(False, "MERGED UNDO: write the base that was merged into", group=OTHER)
    rank: int | None = setting(
        None, "rank of the LoRA written by --loras-only or --extract", group=OTHER, within=AT_LEAST_1
    )
    energy: float | None = setting(
        None,
        "share of each change's sum of squares to keep, instead of --rank; 0 to 1",
        group=OTHER,
        within=Within(0, 1, above=True),
    )
    base: str | None = setting(None, "base whose modules the LoRAs of --loras-only are named after", group=OTHER)
    dialect: str = setting("diffusers", "how a LoRA is written", choices=("diffusers", "kohya", "peft"), group=OTHER)

    output: str | None = setting(None, "file or folder to write; of the base's layout", group=OUTPUT)
    overwrite: bool = setting(False, "write even if there is something there", group=OUTPUT)
    undo: str | None = setting(None, "file for the original bytes of what changes", group=OUTPUT)

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
        wrong += [f"{option(k)} has no effect on {what}" for k, w in only.items() if getattr(self, k) and what not in w]
        if self.dialect != "diffusers" and what in ("a merge", "--restore"):
            wrong.append(f"--dialect has no effect on {what}")
        return wrong
