"""Fold LoRA files into a base checkpoint: W ← W + Σ sᵢ · ΔWᵢ.

    python -m minilora.merge BASE LORA[:STRENGTH] … --output OUT

BASE is a diffusers folder or a single file in the original layout; files/fold.py streams it from disk to disk.  --undo
writes a file with the original bytes of the changed weights, from which --restore gives the base back, byte for byte.
--loras-only merges, resizes and converts LoRAs; --extract makes one from a base and a model fine-tuned from it.
"""

from pathlib import Path

# Before numpy: it sets the number of numpy's threads, which numpy reads when it is imported.
from .files.fold import Report, fold  # isort: skip

import numpy as np

from .files.for_base import read_for
from .files.layout import Checkpoint
from .files.low_rank import combine, extract, of_type, reduce
from .files.tensors import refuse_existing
from .files.undo import restore
from .files.write import write_lora
from .settings.errors import UserError
from .settings.merge import DTYPES, MergeConfig
from .settings.shared import by_name, path_and_number


def merge(config: MergeConfig) -> None:
    """Do what `config` asks for and print a report."""
    output = Path(config.output)
    if config.restore:
        merged, undo = map(Path, config.files)
        count = restore(merged, undo, output, overwrite=config.overwrite)
        report = Report([], {}, [f"put back {count} tensors"])
    elif config.loras_only or config.extract:
        report = _write_lora(config, output)
    else:
        base, *loras = config.files
        report = fold(
            Path(base),
            [(Path(path), strength) for path, strength in map(path_and_number, loras)],
            output,
            blocks=by_name(config.lora_blocks),
            overwrite=config.overwrite,
            undo=Path(config.undo) if config.undo else None,
            allow_unmatched=config.allow_unmatched,
            dtype=np.float64 if config.float64 else np.float32,
            written=DTYPES.get(config.dtype),
            revision=config.revision,
            variant=config.variant,
        )
    print(report)
    print(f"wrote {output}")


def _write_lora(config: MergeConfig, output: Path) -> Report:
    """Write the LoRA that --extract or --loras-only asks for."""
    refuse_existing(output, config.overwrite)
    notes: list[str] = []
    reduction = None
    which = config.revision, config.variant
    if config.extract:
        base, tuned = Checkpoint(Path(config.files[0]), *which), Checkpoint(Path(config.files[1]))
        lora, reduction, notes = extract(base, tuned, config.rank, config.energy)
        modules = base.modules
    else:
        modules = Checkpoint(Path(config.base), *which).modules if config.base else None
        loras = []
        for text in config.files:
            path, strength = path_and_number(text)
            loras.append((read_for(Path(path), modules, config.base or "it", config.allow_unmatched), strength))
            notes += [f"left out: {key} of {path}" for key in loras[-1][0].unmatched]
        lora = combine(loras, by_name(config.lora_blocks))
        lora.metadata = loras[0][0].metadata if len(loras) == 1 else {}
        if config.rank or config.energy:
            lora, reduction = reduce(lora, config.rank, config.energy)
    if modules is None and config.dialect == "kohya":
        raise UserError("--dialect kohya needs --base, to name its modules")
    lora = of_type(lora, DTYPES[config.dtype]) if config.dtype else lora
    padding = write_lora(output, lora, config.dialect, modules)
    ranks = sorted({delta.rank for delta in lora.deltas.values()})
    notes.append(f"{len(lora.deltas)} modules, rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else ""))
    if padding:
        notes.append(
            f"{padding:,} bytes of the file are zeros that make the ranks equal, because programs differ in how they "
            "read several ranks (--dialect peft needs none)"
        )
    return Report([], {}, [*([str(reduction)] if reduction else []), *notes])


if __name__ == "__main__":
    from .settings.command_line import merge as command

    command()
