"""Training a LoRA, top to bottom.

    settings -> base, pictures -> encoded once -> LoRA injected -> the loop -> a LoRA file

A run is a pure function of (base, pictures, settings).  Step s uses the positions
s·B … s·B + B − 1 of an endless stream, B being the global batch size; all that is random at a
position is computed from it (draws.py).  Processes and micro-batches only share out the B positions,
and a run that was stopped goes on as if it had not been.
"""

import dataclasses
import hashlib
import json
import math
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from . import sampling
from .checkpoint import (
    State,
    load_newest_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
    write_whole,
)
from .config import TrainConfig, UserError
from .data import Batch, Examples, read_folder
from .diffusion import Schedule, denoising_loss, offset_noise
from .distributed import Ranks, mean_over_ranks, processes
from .formats import FILE_NAME
from .lora import inject_lora, load_lora_state_dict, lora_parameters, lora_state_dict
from .models import DTYPES, Base, fingerprint, save_lora

# What an objective is: (unet, batch, schedule, config) -> one loss per picture, (batch,).
Objective = Callable[[nn.Module, Batch, Schedule, TrainConfig], torch.Tensor]

# Settings that say where results go or how the work is shared out, and so do not change what is learnt.
_NOT_IN_FINGERPRINT = ("data", "model", "output", "cache", "micro_batch_size", "checkpoint_every", "checkpoints_kept")
_NOT_IN_FINGERPRINT += (
    "resume",
    "sample_prompt",
    "sample_every",
    "caption",
    "caption_column",
    "gradient_checkpointing",
)


def denoising(unet: nn.Module, batch: Batch, schedule: Schedule, config: TrainConfig) -> torch.Tensor:
    """The ordinary objective: predict what noise was added to a picture."""
    noise = offset_noise(batch.noise, batch.noise_offset, config.noise_offset)
    return denoising_loss(unet, batch.latents, batch.text, noise, batch.timesteps, schedule, config.snr_gamma)


def train(config: TrainConfig, objective: Objective = denoising) -> Path:
    """Train a LoRA as `config` says and return the path of its file.

    Raises UserError for anything wrong with the settings, the base, the pictures or a checkpoint,
    and Stopped, after saving, when the process is told to stop.
    """
    with processes() as ranks:
        return _train(config, objective, ranks)


def _train(config: TrainConfig, objective: Objective, ranks: Ranks) -> Path:
    shares = Shares.of(config, ranks)
    say = print if ranks.is_main else (lambda *_: None)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    base = Base(config.model, ranks.device, DTYPES[config.precision])
    resolution = config.resolution or base.resolution
    if resolution % base.side_multiple:
        raise UserError(f"--resolution is {resolution}; this base needs a multiple of {base.side_multiple}")

    # Pictures and captions are encoded once, in float32; then VAE and text encoder leave memory.
    items = read_folder(config, resolution)
    encoders = Base(config.model, ranks.device)
    examples = Examples(items, config, resolution, encoders, len(base.schedule), ranks)
    identity = _identity(config, resolution, base, examples)
    if config.crop == "random":
        say("note: --crop random encodes each draw anew, so the latents are not cached and the VAE stays in memory")
    else:
        del encoders
    base.release("vae")

    unet = base.unet.train()
    try:
        generator = torch.Generator().manual_seed(config.seed)
        layers = inject_lora(unet, config.rank, config.alpha, config.targets, generator=generator)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if ranks.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # measured: faster on a GPU, not on a CPU
    parameters = lora_parameters(unet)
    assert all(p.dtype == torch.float32 for p in parameters)
    assert sum(p.requires_grad for p in unet.parameters()) == len(parameters)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
    model = DistributedDataParallel(unet, broadcast_buffers=False) if ranks.world > 1 else unet

    output = Path(config.output)
    first_step = _resume(config, output, identity, unet, optimizer, scaler, say) if config.resume else 0
    if ranks.is_main:
        write_whole(output / "config.json", config.to_json().encode())
    writer = SummaryWriter(str(output / "tensorboard"), purge_step=first_step) if ranks.is_main else None
    trainable, total = sum(p.numel() for p in parameters), sum(p.numel() for p in unet.parameters())
    say(f"base       {base.source}, {base.schedule.prediction_type}, {config.precision} on {ranks.device}")
    say(f"pictures   {len(items)} of {config.data}, at {resolution} × {resolution} pixels")
    say(f"LoRA       rank {config.rank}, alpha {config.alpha:g}, in {len(layers)} layers")
    say(f"trained    {trainable:,} of {total:,} parameters")
    say(f"batch      {config.batch_size} = {shares}")

    def save(step: int) -> Path:
        state = State(step, lora_state_dict(unet), optimizer_tensors(optimizer), scaler.state_dict())
        return save_checkpoint(output / "checkpoints", state, identity, config.checkpoints_kept)

    signals = _Signals()
    bar = tqdm(total=config.steps, initial=first_step, desc="train", disable=not ranks.is_main, unit="step")
    with signals, bar:
        for step in range(first_step, config.steps):
            # ------------------------------------------------------------- one optimizer step
            learning_rate = learning_rate_at(step, config)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            loss_sum = torch.zeros((), device=ranks.device)
            for number, positions in enumerate(shares.positions(step)):
                batch = examples.batch(positions, ranks.device)
                # Gradients of several micro-batches add up; only the last one averages them over the ranks.
                last = number == shares.accumulation - 1
                with nullcontext() if last or ranks.world == 1 else model.no_sync():
                    with torch.autocast(
                        ranks.device.type, DTYPES[config.precision], enabled=config.precision != "fp32"
                    ):
                        loss = objective(model, batch, base.schedule, config).mean() / shares.accumulation
                    scaler.scale(loss).backward()
                loss_sum += loss.detach()
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            loss_mean, stop = mean_over_ranks(torch.stack([loss_sum, signals.seen.to(ranks.device)])).tolist()
            if not math.isfinite(loss_mean) or not (scaler.is_enabled() or math.isfinite(grad_norm)):
                raise UserError(_not_finite(step, loss_mean, float(grad_norm), examples, config))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            # --------------------------------------------------------------------------------
            done = step + 1
            if ranks.is_main:
                bar.set_postfix(loss=f"{loss_mean:.4f}", lr=f"{learning_rate:.1e}", refresh=False)
                bar.update()
                for name, value in (("loss", loss_mean), ("learning_rate", learning_rate), ("grad_norm", grad_norm)):
                    writer.add_scalar(name, value, done)
                if stop or (config.checkpoint_every and done % config.checkpoint_every == 0 and done < config.steps):
                    path = save(done)
                if config.sample_every and done % config.sample_every == 0:
                    sheet = sampling.draw_prompts(base, config.sample_prompt, config.seed, resolution)
                    sampling.save_picture(sheet, output / "samples" / f"step-{done:08d}.png")
                    writer.add_image("samples", np.array(sheet), done, dataformats="HWC")
            if stop:
                say_stopped = f"stopped after step {done}, saved {path}; go on with --resume" if ranks.is_main else ""
                raise Stopped(signals.number, say_stopped)

    lora_file = output / FILE_NAME
    if ranks.is_main:
        save_lora(unet, lora_file)
        writer.close()
        sheet = sampling.before_after(base, items[0], config.seed, resolution)
        sampling.save_picture(sheet, output / "samples" / "before_after.png")
        say(f"wrote      {lora_file} and {output / 'samples' / 'before_after.png'}")
        model_option = f" --model {config.model}" if config.model else ""
        say(f'next       python sample.py --prompt "{items[0].captions[0]}" --lora {output}{model_option}')
    return lora_file


# ------------------------------------------------------------------------------------- its pieces


@dataclasses.dataclass(frozen=True)
class Shares:
    """How the positions of a step are shared out: over `accumulation` rounds, `world` ranks, `micro` each."""

    batch: int
    micro: int
    rank: int
    world: int

    @classmethod
    def of(cls, config: TrainConfig, ranks: Ranks) -> "Shares":
        """Raise UserError, with the numbers, if the batch cannot be divided so."""
        micro = config.micro_batch_size or max(1, config.batch_size // ranks.world)
        if config.batch_size % (micro * ranks.world):
            raise UserError(
                f"--batch-size is {config.batch_size}; it cannot be divided into micro-batches of {micro} "
                f"on each of {ranks.world} processes"
            )
        return cls(config.batch_size, micro, ranks.rank, ranks.world)

    @property
    def accumulation(self) -> int:
        return self.batch // (self.micro * self.world)

    def positions(self, step: int) -> list[range]:
        """Return this rank's micro-batches of a step, each a range of positions."""
        starts = (step * self.batch + (n * self.world + self.rank) * self.micro for n in range(self.accumulation))
        return [range(start, start + self.micro) for start in starts]

    def __str__(self) -> str:
        return f"{self.micro} pictures × {self.accumulation} accumulated × {self.world} processes"


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: a linear rise, then constant, or a fall to 0 at the end."""
    # 1. warm-up: the first step already learns a little
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.lr_schedule == "constant":
        return config.learning_rate
    # 2. from 1 just after the warm-up to 0 just after the last step
    left = (config.steps - step) / max(1, config.steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return config.learning_rate * left
    return config.learning_rate * 0.5 * (1 - math.cos(math.pi * left))


class Stopped(Exception):
    """The process was told to stop, and the run was saved."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class _Signals:
    """Notice SIGTERM and SIGINT instead of dying of them; a second one is obeyed at once."""

    def __enter__(self):
        self.seen = torch.zeros(())  # a tensor, since one rank's signal must stop all of them
        self.number = signal.SIGTERM
        self.before = {number: signal.signal(number, self._notice) for number in (signal.SIGTERM, signal.SIGINT)}

    def _notice(self, number, frame):
        self.seen = torch.ones(())
        self.number = number
        self._restore()

    def _restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *error):
        self._restore()


def _identity(config: TrainConfig, resolution: int, base: Base, examples: Examples) -> dict:
    """Return what the run is a function of, as JSON values: settings, pictures with captions, base."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_IN_FINGERPRINT}
    if config.lr_schedule == "constant":
        del settings["steps"]  # then a longer run begins as a shorter one
    pictures = hashlib.sha256(json.dumps([[i.digest, i.captions] for i in examples.items]).encode()).hexdigest()
    made_of = {"unet": fingerprint(base.unet), "vae": examples.vae, "text_encoder": examples.text_encoder}
    return settings | {"targets": list(config.targets), "resolution": resolution, "pictures": pictures} | made_of


def _resume(config, output: Path, identity: dict, unet, optimizer, scaler, say) -> int:
    """Load the newest checkpoint, if there is one, and return the number of steps already done."""
    try:
        state = load_newest_checkpoint(output / "checkpoints", identity)
    except ValueError as error:
        raise UserError(f"--resume: {error}") from error
    if state is None:
        say(f"note: --resume found no checkpoint in {output / 'checkpoints'}; starting from the beginning")
        return 0
    if state.step > config.steps:
        raise UserError(f"--resume: the checkpoint has {state.step} steps done, more than --steps {config.steps}")
    load_lora_state_dict(unet, state.lora)
    load_optimizer_tensors(optimizer, state.optimizer)
    scaler.load_state_dict(state.scaler)
    say(f"resume     after step {state.step}")
    return state.step


def _not_finite(step: int, loss: float, grad_norm: float, examples: Examples, config: TrainConfig) -> str:
    positions = range(step * config.batch_size, (step + 1) * config.batch_size)
    pictures = ", ".join(dict.fromkeys(examples.picture_at(p).path.name for p in positions))
    return f"step {step + 1}: the loss is {loss} and the gradient's norm {grad_norm}; its pictures are {pictures}"
