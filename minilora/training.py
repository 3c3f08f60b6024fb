"""Training a LoRA, top to bottom.

    settings -> base, pictures -> encoded once -> LoRA injected -> the loop -> a LoRA file

A run is a pure function of (base, pictures, settings).  Step s uses the positions
s·B … s·B + B − 1 of an endless stream, B being the global batch size; all that is random at a
position is computed from it (data/draws.py).  Processes and micro-batches only share out the B positions,
and a run that was stopped goes on as if it had not been.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import sampling
from .data import draws
from .data.buckets import Size, bucket_sizes
from .data.examples import Examples
from .data.folder import Item
from .files.names import UNET
from .files.network import load_lora, save_lora
from .files.read import AVERAGE_NAME, FILE_NAME
from .files.tensors import write_whole
from .lora import add_lora, load_lora_state_dict, lora_layers, lora_parameters, lora_state_dict
from .models.base import DTYPES, Base, UNetWithText, fingerprint
from .models.compiling import check_compiler, compile_options
from .models.targets import ranks_and_alphas
from .run import checkpoint
from .run.card import drawing_command, model_card
from .run.dreambooth import class_pictures
from .run.ema import ema_update, ema_weights
from .run.encode import encoded_examples
from .run.hub import check_login, push
from .run.lost import heartbeat, rescue
from .run.objective import Denoising, Objective
from .run.ranks import (
    BatchPlan,
    Ranks,
    StopSignals,
    decided_by_main,
    mean_over_ranks,
    processes,
    refuse_differences,
    wait_for_all,
)
from .run.tracking import Log
from .run.validation import BEST, FIGURES, Validation, read_pictures
from .settings.errors import UserError
from .settings.sample import SampleConfig
from .settings.train import TrainConfig


class Stopped(SystemExit):
    """The process was told to stop, and the run was saved; it ends with the exit code that a shell expects."""

    def __init__(self, signal_number: int):
        super().__init__(128 + signal_number)


def train(config: TrainConfig, objective: Objective | None = None) -> Path:
    """Train a LoRA as `config` says and return the path of its file.

    Raises UserError for anything wrong with the settings, the base, the pictures or a checkpoint,
    and Stopped, after saving, when the process is told to stop.
    """
    with processes(config.timeout) as ranks, checkpoint.OutputLock(Path(config.output)) as here:
        if not config.resume:
            decided_by_main(lambda: checkpoint.refuse_unfinished(Path(config.output)))
        if config.push_to_hub:
            decided_by_main(lambda: check_login(config.push_to_hub))
        if config.compile:
            check_compiler(ranks.device)
        run = prepare(config, objective or Denoising(), ranks)
        done = first_step = resume(run) if config.resume else start(run)
        if ranks.is_main:
            write_whole(run.output / "config.json", config.to_json().encode())
        bar = tqdm(total=config.steps, initial=first_step, desc="train", unit="step", disable=not ranks.is_main)
        validation = Validation(run, first_step) if config.validation else None

        def save_done() -> None:
            ranks.say(f"\nsaved {save_state(run, done)}; go on with --resume")

        with StopSignals() as signals, rescue(save_done), Log(run, first_step) as log, bar:
            if validation and not validation.losses:
                log.numbers(first_step, validation=validation.measure(first_step))
            for step in range(first_step, config.steps):
                learning_rate, began = learning_rate_at(step, config), time.monotonic()
                loss, grad_norm = optimizer_step(run, step, learning_rate)
                done = step + 1
                here.refuse_if_gone()
                if config.compile and step == first_step:
                    bar.clear()
                    ranks.say(f"compiled   within the first step, of {time.monotonic() - began:.0f} s")
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{learning_rate:.1e}", refresh=False)
                bar.update()
                log.numbers(step + 1, loss=loss, learning_rate=learning_rate, grad_norm=grad_norm)
                if validation and (is_due(config.validate_every, step) or step + 1 == config.steps):
                    log.numbers(step + 1, validation=validation.measure(step + 1))
                stop = signals.seen_by_any(ranks)
                if stop or is_due(config.checkpoint_every, step):
                    saved = save_state(run, step + 1)
                if is_due(config.sample_every, step):
                    log.samples(step + 1)
                    wait_for_all()
                if stop:
                    wait_for_all()  # the others must not be gone while the main process still writes
                    bar.close()
                    ranks.say(f"stopped after step {step + 1}, saved {saved}; go on with --resume")
                    raise Stopped(signals.number)
        if validation:
            ranks.say(f"validation {validation}")
        here.refuse_if_gone()
        return finish(run)


@dataclass(frozen=True)
class Run:
    """What a run is made of, once everything is loaded, checked and encoded."""

    config: TrainConfig
    objective: Objective
    ranks: Ranks
    plan: BatchPlan
    base: Base
    examples: Examples
    held_out: Examples | None  # the pictures of --validation
    identity: dict  # what the run is a function of, as JSON values
    network: nn.Module  # what carries the LoRA: the U-Net, or it and its text encoders
    model: nn.Module  # the network; compiled if asked for, and wrapped so that several processes average gradients
    parameters: list[nn.Parameter]  # all that is trained; the one list for optimizer, clipping and counting
    average: dict[str, torch.Tensor]  # of what is trained, over the steps; empty without --ema
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # keeps fp16 gradients from vanishing; does nothing otherwise

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    def drawing(self, prompts: tuple[str, ...]) -> SampleConfig:
        """Return the settings that sample.py has for these prompts by default, so that it draws the same."""
        config = self.config
        same = {name: getattr(config, name) for name in ("model", "model_config", "seed", "zero_terminal_snr")}
        return SampleConfig(prompt=prompts, **same)

    def as_drawn(self) -> AbstractContextManager:
        """Return within what pictures are drawn: the LoRA is its average, with --sample-average, or stays as it is."""
        return ema_weights(self.network, self.average) if self.config.sample_average else nullcontext()


# ------------------------------------------------------------------------------ before the first step


def prepare(config: TrainConfig, objective: Objective, ranks: Ranks) -> Run:
    """Read the pictures, encode them by the base, put the LoRA in, make the optimizer, and say so."""
    plan = BatchPlan(config.batch_size, config.micro_batch_size, ranks.rank, ranks.world)
    items, held_out_items = read_pictures(config, ranks)
    others = class_pictures(config, ranks) if config.class_prompt else []
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    base = load_base(config, ranks.device)
    examples, held_out = encode(config, base, ranks, items, others, held_out_items)
    identity = _identity(config, base, examples) | {"objective": objective.name()}

    unet = base.unet
    if ranks.device.type == "cuda":  # before the LoRA: what the optimizer keeps of it has no order of its own
        unet.to(memory_format=torch.channels_last)
    network = (UNetWithText(base) if config.train_text_encoder else unet).train()
    identity |= put_lora(network, unet, config)
    refuse_differences(identity)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    objective.begin(network, config)
    parameters = lora_parameters(network)
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert sum(parameter.requires_grad for parameter in network.parameters()) == len(parameters)
    optimizer = make_optimizer(config, parameters, len(lora_parameters(unet)))
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
    model = torch.compile(network, **compile_options(ranks.device)) if config.compile else network
    # Each process has loaded the base and drawn the LoRA itself, so that nothing but gradients has to travel.
    alone = {"init_sync": False, "forward_sync_buffers": False}
    model = DistributedDataParallel(model, **alone) if ranks.world > 1 else model
    average = {name: tensor.clone() for name, tensor in lora_state_dict(network).items()} if config.ema else {}
    trained = network, model, parameters, average, optimizer, scaler
    run = Run(config, objective, ranks, plan, base, examples, held_out, identity, *trained)
    introduce(run)
    return run


def load_base(config: TrainConfig, device: torch.device) -> Base:
    """Return the base; UserError if the settings do not fit it."""
    names = config.model_config, config.zero_terminal_snr, config.base_lora
    base = Base(config.model, device, DTYPES[config.precision], *names)
    if config.timestep_range and config.timestep_range[1] > len(base.schedule):
        given = ",".join(map(str, config.timestep_range))
        raise UserError(f"--timestep-range is {given}; this base has the timesteps 0 to {len(base.schedule) - 1}")
    base.refuse_inpainting()
    if config.resolution and config.resolution % base.side_multiple:
        raise UserError(f"--resolution is {config.resolution}; this base needs a multiple of {base.side_multiple}")
    return base


def encode(
    config: TrainConfig, base: Base, ranks: Ranks, items: list[Item], others: list[Item], held_out_items: list[Item]
) -> tuple[Examples, Examples | None]:
    """Return what training sees of its pictures and of those of the class, and of held-out pictures, if any."""
    resolution = config.resolution or base.resolution
    sizes = _sizes_for(base, resolution) if config.buckets else ()
    if config.train_text_encoder:
        ranks.say("note: --train-text-encoder changes what captions mean, so they are encoded anew at each step")
    # Pictures and captions are encoded in float32: a VAE in half precision can overflow.
    encoders = Base(config.model, ranks.device, config=config.model_config, loras=config.base_lora)
    how = resolution, encoders, len(base.schedule), ranks, sizes
    examples = encoded_examples(items, config, *how, others)
    plain = replace(config, mirror=False, crop="center")
    held_out = encoded_examples(held_out_items, plain, *how) if held_out_items else None
    encoders.release("text_encoder", "text_encoder_2", *([] if config.crop == "random" else ["vae"]))
    return examples, held_out


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter], of_unet: int) -> torch.optim.Optimizer:
    """Return AdamW over all that is trained; those behind the U-Net's have the text encoders' learning rate."""
    text_ratio = (config.text_encoder_learning_rate or config.learning_rate) / config.learning_rate
    groups = [{"params": parameters[:of_unet], "ratio": 1.0}, {"params": parameters[of_unet:], "ratio": text_ratio}]
    groups = [group for group in groups if group["params"]]
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    from bitsandbytes.optim import AdamW8bit  # which need not be there

    # By default it leaves smaller ones than 4,096 numbers in float32, as most matrices of a LoRA are.
    return AdamW8bit(groups, **options, min_8bit_size=256)


def introduce(run: Run) -> None:
    """Say what is trained, on what, and how."""
    config, examples, say = run.config, run.examples, run.ranks.say
    seen_at = f"{examples.resolution} × {examples.resolution}"
    if config.buckets:
        seen_at = " and ".join(f"{w} × {h} ({len(inside)})" for (w, h), inside in examples.buckets.items())
    layers = lora_layers(run.network)
    each = {(a.rank, a.alpha) for layer in layers.values() for a in layer.adapters.values()}
    rank, alpha = (
        f"{min(some):g}" if len({*some}) == 1 else f"{min(some):g} to {max(some):g}" for some in zip(*each, strict=True)
    )
    numbers, total = (sum(p.numel() for p in some) for some in (run.parameters, run.network.parameters()))
    on_top = "".join(f" + {lora}" for lora in config.base_lora)
    say(
        f"base       {run.base.source}{on_top}, {run.base.schedule.prediction_type}, {config.precision} on "
        f"{run.ranks.device.type}"
    )
    say(f"pictures   {len(examples.items)} of {', '.join(config.data)}, at {seen_at} pixels")
    if config.validation_share is not None:
        say(f"validation {len(run.held_out.items)} held-out pictures of them")
    if examples.class_items:
        say(f"class      {len(examples.class_items)} pictures of {config.class_prompt!r}, every other one that is seen")
    say(f"LoRA       rank {rank}, alpha {alpha}, in {len(layers)} layers")
    say(f"trained    {numbers:,} of {total:,} parameters")
    say(f"batch      {config.batch_size} = {run.plan}")


def put_lora(network: nn.Module, unet: nn.Module, config: TrainConfig) -> dict:
    """Put the LoRA that is trained into the network; return what the run is a function of by it, as JSON values."""
    if config.init_from:
        try:
            parts = [folded.component for folded in load_lora(network, config.init_from).folded]
        except UserError as error:
            hint = "" if config.train_text_encoder else " (one of text encoders, too, needs --train-text-encoder)"
            raise UserError(f"--init-from: {error}{hint}") from error
        if UNET not in parts or (config.train_text_encoder and len(parts) == 1):
            lacks = "U-Net" if UNET not in parts else "text encoders, which --train-text-encoder would train"
            raise UserError(f"--init-from {config.init_from}: it changes nothing in the {lacks}")
        numbers = b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in lora_parameters(network))
        return {"init_from": hashlib.sha256(numbers).hexdigest()}
    generator = torch.Generator().manual_seed(config.seed)
    try:
        ranks, alphas = ranks_and_alphas(unet, config.targets, config.rank, config.alpha, **config.by_part())
        add_lora(unet, ranks, alphas, generator=generator, fitting=True)
        if config.train_text_encoder:
            network.inject(config.rank, config.alpha, config.text_encoder_targets, generator=generator)
    except ValueError as error:
        raise UserError(str(error)) from error
    return {}


def _sizes_for(base: Base, resolution: int) -> list[Size]:
    """Return the sizes of --buckets on a base; UserError if there is none."""
    # Steps of 64 pixels, as is usual, would be too coarse for a miniature.
    multiple = max(64, base.side_multiple) if base.resolution >= 256 else base.side_multiple
    if sizes := bucket_sizes(resolution, multiple):
        return sizes
    raise UserError(f"--resolution is {resolution}; --buckets needs at least {multiple} on this base")


def _identity(config: TrainConfig, base: Base, examples: Examples) -> dict:
    """Return what the run is a function of, as JSON values: settings, pictures with captions, base."""
    return config.identity() | {
        "resolution": examples.resolution,
        "schedule": [base.schedule.prediction_type, *base.schedule.alphas_cumprod[[0, -1]].tolist()],
        "pictures": examples.content(),
        "unet": fingerprint(base.unet),
        "vae": examples.vae,
        "text_encoder": examples.text_encoder,
    }


# -------------------------------------------------------------------------------------- the step


def optimizer_step(run: Run, step: int, learning_rate: float) -> tuple[float, float]:
    """Take one optimizer step; return the loss, a mean over the whole batch, and the gradient's norm.

    Raises UserError, with the step and its pictures, if one of them is not finite.
    """
    config, device = run.config, run.ranks.device
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]
    loss_sum = torch.zeros((), device=device)
    micro_batches = run.plan.positions(step)
    for number, positions in enumerate(micro_batches, start=1):
        batch = run.examples.batch(positions, device)
        drop_features(run, positions)
        # The gradients of the micro-batches add up, and only the last backward pass averages them over
        # the processes.  no_sync must be around the forward pass too, or it has no effect.
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
    # In fp16 a gradient that overflows is ordinary: the scaler skips the step and scales less, down to 1.
    overflow = run.scaler.is_enabled() and run.scaler.get_scale() > 1
    if not math.isfinite(loss_mean) or not (math.isfinite(grad_norm) or overflow):
        pictures = ", ".join(dict.fromkeys(run.examples.picture_at(p).path.name for p in run.plan.all_positions(step)))
        raise UserError(
            f"step {step + 1}: loss {loss_mean}, norm of the gradient {grad_norm}; its pictures: {pictures}"
        )
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.objective.after_step()
    if config.ema:
        ema_update(run.network, run.average, step, config.ema)
    return loss_mean, grad_norm


def drop_features(run: Run, positions: Sequence[int]) -> None:
    """Draw the dropout masks of this micro-batch, one per picture and layer."""
    if dropout := run.config.dropout:
        for path, layer in lora_layers(run.network).items():
            adapter, what = layer.adapters["default"], f"dropout of {path}"
            count = adapter.lora_A.shape[1]
            masks = [draws.dropout_mask(run.config.seed, what, position, count, dropout) for position in positions]
            adapter.dropout_mask = torch.stack(masks).to(run.ranks.device)  # (batch, in)


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


def is_due(every: int | None, step: int) -> bool:
    """Whether something that is done after every so many steps is done after this one."""
    return every is not None and (step + 1) % every == 0


# -------------------------------------------------------------------------------- what a run leaves


def save_state(run: Run, step: int) -> Path:
    """Write a checkpoint after `step` steps and return its path."""
    lora, optimizer = lora_state_dict(run.network), checkpoint.optimizer_tensors(run.optimizer)
    state = checkpoint.State(step, lora, optimizer, run.average, run.objective.state(), run.scaler.state_dict())
    if run.ranks.is_main:
        checkpoint.save_checkpoint(run.output, state, run.identity, run.config.checkpoints_kept)
    return checkpoint.path_of(run.output, step)


def start(run: Run) -> int:
    """Begin in the output folder, and return the number of steps done, 0."""
    if run.ranks.is_main:
        checkpoint.begin(run.output)
    return 0


def resume(run: Run) -> int:
    """Take up the newest checkpoint, if there is one, and return the number of steps already done."""

    def load() -> checkpoint.State | None:
        checkpoint.take_up(run.output)
        try:
            return checkpoint.load_newest_checkpoint(run.output, run.identity)
        except ValueError as error:
            raise UserError(f"--resume: {error}") from error

    state = decided_by_main(load)
    if state is None:
        run.ranks.say(f"note: --resume found no checkpoint in {run.output}; starting from the beginning")
        return start(run)
    if state.step > run.config.steps:
        raise UserError(f"--resume: the checkpoint has {state.step} steps done, more than --steps {run.config.steps}")
    load_lora_state_dict(run.network, state.lora)
    checkpoint.load_optimizer_tensors(run.optimizer, state.optimizer)
    for key, tensor in run.average.items():
        tensor.copy_(state.average[key])
    for key, tensor in run.objective.state().items():
        tensor.copy_(state.objective[key])
    run.scaler.load_state_dict(state.scaler)
    if run.ranks.is_main:
        (run.output / checkpoint.UNFINISHED).mkdir(exist_ok=True)
    run.ranks.say(f"resume     after step {state.step}")
    return state.step


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
