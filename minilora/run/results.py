"""After the last step: the LoRA file, the sheet that shows what it does, the model card, the hub."""

from pathlib import Path

from .. import sampling
from ..files.network import save_lora
from ..files.read import AVERAGE_NAME, FILE_NAME
from ..files.tensors import write_whole
from . import checkpoint
from .card import drawing_command, model_card
from .ema import ema_weights
from .hub import push
from .lost import heartbeat
from .ranks import (
    decided_by_main,
    wait_for_all,
)
from .setup import Run
from .validation import BEST, FIGURES


def finish(run: Run) -> Path:
    """Write the LoRA file, draw the sheet that shows what it does, push them if asked to, and say what to type next."""
    config, item = run.config, run.examples.items[0]
    lora_file, sheet_file = run.output / FILE_NAME, run.output / "samples" / "before_after.png"
    sheet_name = sheet_file.relative_to(run.output).as_posix()
    in_dialects = {"kohya": f"{run.output.resolve().name}.safetensors", "peft": "peft"}
    if run.ranks.is_main:
        save_lora(run.network, lora_file)
        if run.average:
            with ema_weights(run.network, run.average):
                save_lora(run.network, run.output / AVERAGE_NAME)
            run.ranks.say(f"wrote      {run.output / AVERAGE_NAME}, the moving average")
        made = {AVERAGE_NAME: config.ema, FIGURES: config.validation, BEST: config.validation}
        checkpoint.publish(run.output, made, [name for name, asked in made.items() if not asked])
        for dialect in config.also:
            also = run.output / in_dialects[dialect]
            save_lora(run.network, also, dialect=dialect)
            run.ranks.say(f"wrote      {also}, for programs that read {dialect}'s dialect")
        size, drawing = run.examples.size_of(item), run.drawing(item.captions[:1])
        with run.as_drawn():
            sheet = sampling.before_after(run.base, item, size, drawing, heartbeat)
        sampling.save_picture(sheet, sheet_file)
        card = model_card(config, run.examples.items, run.base.is_xl, sheet_name)
        write_whole(run.output / "README.md", card.encode())
        run.ranks.say(f"wrote      {lora_file} and {sheet_file}")
    wait_for_all()  # a drawing may take long; here, and not in what follows, it gives heartbeats
    if config.push_to_hub:
        results = [FILE_NAME, *([AVERAGE_NAME] if config.ema else []), *([BEST] if config.validation else [])]
        results += [in_dialects[dialect] for dialect in config.also]
        results += ["README.md", "config.json", sheet_name]
        url = decided_by_main(lambda: push(config.push_to_hub, run.output, results))
        run.ranks.say(f"pushed     to {url}")
    run.ranks.say(f"next       {drawing_command(config, item.captions[0], config.output)}")
    return lora_file
