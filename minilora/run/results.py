"""After the last step: the LoRA file, the before-and-after sheet, the model card, the hub."""

import sys
from pathlib import Path

from ..data.folder import Item
from ..data.sheet import save_picture
from ..files.network import save_lora
from ..files.tensors import write_whole
from ..models.base import Base
from ..settings.errors import UserError, first_line, is_out_of_memory
from . import checkpoint, samples
from .card import drawing_command, model_card
from .ema import ema_weights
from .hub import push
from .ranks import decided_by_main, wait_for_all
from .setup import Run
from .trained import FULL_RESULTS, LORA_RESULTS, result_names, save_base
from .validation import FIGURES


def finish(run: Run) -> Path:
    """Write the result, draw the before-and-after sheet, push both if asked to, and print the next command.

    Returns the path of the LoRA file or, with --full, of the folder of the trained base.
    """
    config, item = run.config, run.examples.items[0]
    result, average, best = result_names(config.full)
    made = [result, *([average] if config.ema else []), *([best] if config.validation else [])]
    sheet_file, sheet_name = run.output / "samples" / "before_after.png", None
    in_dialects = {"kohya": f"{run.output.resolve().name}.safetensors", "peft": "peft"}
    if run.ranks.is_main:
        zeros = save_result(run, result)
        if run.average:
            with ema_weights(run.network, run.average):
                save_result(run, average)
            run.ranks.say(f"wrote      {run.output / average}, the moving average")
        published = [*made, *([FIGURES] if config.validation else [])]
        checkpoint.publish(run.output, published, {*LORA_RESULTS, *FULL_RESULTS, FIGURES} - {*published})
        for dialect in config.also:
            also = run.output / in_dialects[dialect]
            save_lora(run.network, also, dialect=dialect)
            run.ranks.say(f"wrote      {also}, for programs that read {dialect}'s dialect")
        sheet_name = draw_sheet(run, item, sheet_file)
        card = model_card(config, run.examples.items, run.base.is_xl, sheet_name, run.base.scheduler_options)
        write_whole(run.output / "README.md", card.encode())
        run.ranks.say(f"wrote      {run.output / result}{f' and {sheet_file}' if sheet_name else ''}")
        if zeros:
            run.ranks.say(
                f"ranks      {zeros:,} bytes of the LoRA are zeros, so that all programs read its ranks alike"
            )
    wait_for_all()  # drawing may take long, and sends heartbeats; pushing sends none
    if config.push_to_hub:
        results = [*made, *(in_dialects[dialect] for dialect in config.also), "README.md", "config.json"]
        results += [sheet_name] if sheet_name else []
        url = decided_by_main(lambda: push(config.push_to_hub, run.output, results))
        run.ranks.say(f"pushed     to {url}")
    run.ranks.say(f"next       {drawing_command(config, item.captions[0], config.output)}")
    return run.output / result


def save_result(run: Run, name: str) -> int:
    """Write a result for `publish`; return the number of bytes that pad a LoRA with zeros (see `save_lora`)."""
    path = run.output / checkpoint.UNFINISHED / name
    if not run.config.full:
        return save_lora(run.network, path)
    save_base(run.base, path)
    return 0


def draw_sheet(run: Run, item: Item, path: Path) -> str | None:
    """Draw the before-and-after sheet; return its path in the output folder, or None if drawing failed.

    A GPU with enough memory for training may have too little for drawing, and the LoRA must not be lost because of it.
    """
    config = run.config
    try:
        with run.as_drawn():
            size, drawing = run.examples.size_of(item), run.drawing(item.captions[:1])
            before = Base.of(config, run.ranks.device, config.precision, config.base_lora) if config.full else None
            sheet = samples.before_after(run.base, item, size, drawing, before)
    except (RuntimeError, MemoryError, UserError) as error:
        if not isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        print(f"warning: no pictures were drawn ({first_line(error)}); the training is complete", file=sys.stderr)
        path.unlink(missing_ok=True)  # an old sheet would show the LoRA of another run
        return None
    save_picture(sheet, path)
    return path.relative_to(run.output).as_posix()
