"""Training a LoRA, top to bottom.

    settings -> base, pictures -> encoded once -> LoRA injected -> the loop -> a LoRA file

A run is a pure function of (base, pictures, settings).  Training consumes positions 0, 1, 2, …; the position and the
seed alone decide picture, caption, crop, noise and timestep (data/draws.py).  Step s takes the positions
s·B … s·B + B − 1, where B is the global batch size.  Processes and micro-batches only divide these B positions.  So a
resumed run gives the same result as an uninterrupted one.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .data import draws
from .lora import lora_layers
from .models.precision import DTYPES
from .run.checkpoint import OutputLock
from .run.ema import ema_update
from .run.lost import rescue
from .run.objective import Denoising, Objective
from .run.preview import write_preview
from .run.ranks import StopSignals, decided_by_main, mean_over_ranks, processes, wait_for_all
from .run.results import finish
from .run.resume import begin, save_state
from .run.setup import Run, prepare
from .run.tracking import Log
from .settings.errors import UserError
from .settings.train import TrainConfig


class Stopped(SystemExit):
    """A signal stopped the process after the run was saved; the exit code is the one that shells expect."""

    def __init__(self, signal_number: int):
        super().__init__(128 + signal_number)


def train(config: TrainConfig, objective: Objective | None = None) -> Path:
    """Train a LoRA as `config` says and return the path of its file; with --preview, that of the preview.

    Raises UserError for anything wrong with the settings, the base, the pictures or a checkpoint.  Raises Stopped,
    after saving, when a signal asks the process to stop.
    """
    with processes(config.timeout) as ranks, OutputLock(Path(config.output)) as lock:
        if config.preview:
            return decided_by_main(lambda: write_preview(config))
        run = prepare(config, objective or Denoising(), ranks)
        config, validation, first_step = run.config, run.validation, begin(run)
        bar = tqdm(total=config.steps, initial=first_step, desc="train", unit="step", disable=not ranks.is_main)

        def save_done() -> None:  # the bar counts the finished steps on the process that writes
            ranks.say(f"\nsaved {save_state(run, bar.n)}; continue with --resume")

        with StopSignals() as signals, rescue(save_done), Log(run, first_step) as log, bar:
            if validation and not validation.losses:
                log.numbers(first_step, validation=validation.measure(first_step))
            for step in range(first_step, config.steps):
                if validation and validation.has_stalled():
                    break
                began = time.monotonic()
                loss, grad_norm = optimizer_step(run, step, learning_rate_at(step, config))
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{run.learning_rate:.1e}", refresh=False)
                bar.update()
                lock.refuse_if_gone()
                if config.compile and step == first_step:
                    bar.clear()
                    ranks.say(f"compiled   in the first step, which took {time.monotonic() - began:.0f} s")
                log.numbers(step + 1, loss=loss, learning_rate=run.learning_rate, grad_norm=grad_norm)
                if validation and (is_due(config.validate_every, step) or step + 1 == config.steps):
                    log.numbers(step + 1, validation=validation.measure(step + 1))
                stop, now = signals.seen_by_any(ranks)
                if stop or now or is_due(config.checkpoint_every, step):
                    saved = save_state(run, step + 1)
                if is_due(config.sample_every, step) or (now and config.sample_prompt):
                    log.samples(step + 1)
                    wait_for_all()
                if stop:
                    wait_for_all()  # no process may end while the main process still writes
                    bar.close()
                    ranks.say(f"stopped after step {step + 1}, saved {saved}; continue with --resume")
                    raise Stopped(signals.number)
        if validation:
            validation.finish()
        lock.refuse_if_gone()
        return finish(run)


# -------------------------------------------------------------------------------------- the step


def optimizer_step(run: Run, step: int, learning_rate: float) -> tuple[float, float]:
    """Take one optimizer step; return the mean loss over the whole batch, and the gradient's norm.

    Raises UserError, with the step and its pictures, if loss or norm is not finite.
    """
    config, device = run.config, run.ranks.device
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]  # text encoders may have a learning rate of their own
    loss_sum = torch.zeros((), device=device)
    micro_batches = run.plan.positions(step)
    for number, positions in enumerate(micro_batches, start=1):
        batch = run.examples.batch(positions, device)
        draw_dropout_masks(run, positions)
        # The gradients of the micro-batches add up, and only the last backward pass averages them over the processes.
        # no_sync must enclose the forward pass, too, or it has no effect.
        last = number == len(micro_batches)
        with nullcontext() if last or run.ranks.world == 1 else run.model.no_sync():
            with torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
                losses = run.objective.loss(run.model, batch, run.base.schedule, config)  # (batch,)
                loss = (losses * batch.weights).mean() / len(micro_batches)
            run.scaler.scale(loss).backward()
        loss_sum += loss.detach()
    run.scaler.unscale_(run.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.parameters, config.max_grad_norm).item()
    loss_mean = mean_over_ranks(loss_sum).item()
    run.objective.before_step()
    refuse_infinite(run, step, loss_mean, grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.objective.after_step()
    if config.ema:
        ema_update(run.network, run.average, step, config.ema)
    return loss_mean, grad_norm


def refuse_infinite(run: Run, step: int, loss: float, grad_norm: float) -> None:
    """Raise UserError for a loss or a norm that is not finite, except where the scaler skips the step."""
    # In fp16 a gradient that is not finite usually means overflow: the scaler skips the step and lowers its factor.
    # (DDP has averaged the gradients, so every process skips it.)  At a factor of 1 it cannot be overflow.
    may_overflow = run.scaler.is_enabled() and run.scaler.get_scale() > 1
    if not math.isfinite(loss) or not (math.isfinite(grad_norm) or may_overflow):
        pictures = ", ".join(dict.fromkeys(run.examples.picture_at(p).path.name for p in run.plan.all_positions(step)))
        raise UserError(f"step {step + 1}: loss {loss}, norm of the gradient {grad_norm}; its pictures: {pictures}")


def draw_dropout_masks(run: Run, positions: Sequence[int]) -> None:
    """Draw the dropout masks of this micro-batch, one per picture and layer."""
    if dropout := run.config.dropout:
        for path, layer in lora_layers(run.network).items():
            adapter, what = layer.adapters["default"], f"dropout of {path}"
            count = adapter.lora_A.shape[1]
            masks = [draws.dropout_mask(run.config.seed, what, position, count, dropout) for position in positions]
            adapter.dropout_mask = torch.stack(masks).to(run.ranks.device)  # (batch, in)


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: a linear rise, then constant or falling to 0 at the end."""
    # 1. warm-up; its first step has a rate above 0
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.lr_schedule == "constant":
        return config.learning_rate
    # 2. from 1 just after the warm-up to 0 just after the last step
    left = (config.steps - step) / max(1, config.steps - config.warmup_steps)
    if config.lr_schedule in ("linear", "polynomial"):
        return config.learning_rate * left**config.lr_power
    if config.lr_schedule == "cosine_with_restarts":
        left = 1 - (1 - left) * config.lr_cycles % 1
    return config.learning_rate * 0.5 * (1 - math.cos(math.pi * left))


def is_due(every: int | None, step: int) -> bool:
    """Whether something done every `every` steps is due after this step."""
    return every is not None and (step + 1) % every == 0
