"""Before the first step: read the pictures, load the base, encode, inject the LoRA, make the optimizer."""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data.examples import Examples
from ..files.names import UNET
from ..files.network import load_lora
from ..lora import lora_layers, lora_parameters
from ..models.base import Base
from ..models.compiling import check_compiler, compile_options
from ..models.fingerprint import fingerprint
from ..models.precision import SMALL
from ..models.text import UNetWithText
from ..settings.errors import UserError
from ..settings.sample import SampleConfig
from ..settings.train import TrainConfig
from .checkpoint import refuse_unfinished
from .dreambooth import class_pictures
from .ema import ema_weights
from .encode import encode, notes
from .hub import check_login
from .memory import tell_memory
from .objective import Objective
from .prodigy import Prodigy
from .ranks import BatchPlan, Ranks, decided_by_main, refuse_differences
from .trained import copied_state, put_new_lora, trained_parameters
from .validation import Validation, read_pictures


@dataclass(frozen=True)
class Run:
    """All parts of a run, loaded, checked and encoded."""

    config: TrainConfig
    objective: Objective
    ranks: Ranks
    plan: BatchPlan
    base: Base
    examples: Examples
    validation: Validation | None
    identity: dict  # everything that determines the result, as JSON values
    network: nn.Module  # has the LoRA in it: the U-Net, or the U-Net with its text encoders
    model: Any  # the network; compiled if asked for, and wrapped so that several processes average gradients
    parameters: list[nn.Parameter]  # all trained parameters; the one list for optimizer, clipping and counting
    average: dict[str, torch.Tensor]  # the moving average of the trained weights; empty without --ema
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # keeps fp16 gradients from vanishing; does nothing otherwise

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the U-Net as the last step had it, times what Prodigy has found."""
        found = self.optimizer.d if isinstance(self.optimizer, Prodigy) else 1.0
        return self.optimizer.param_groups[0]["lr"] * found

    def drawing(self, prompts: tuple[str, ...]) -> SampleConfig:
        """Return the settings to draw these prompts, with the defaults of sample.py."""
        return SampleConfig(prompt=prompts, seed=self.config.seed, **self.config.base_settings())

    def as_drawn(self) -> AbstractContextManager:
        """Return the context for drawing: with --sample-average the LoRA is replaced by its moving average."""
        return ema_weights(self.network, self.average) if self.config.sample_average else nullcontext()


# ------------------------------------------------------------------------------ before the first step


def prepare(config: TrainConfig, objective: Objective, ranks: Ranks) -> Run:
    """Read and encode the pictures, inject the LoRA, make the optimizer, and print a summary."""
    check(config, ranks)
    plan = BatchPlan(config.batch_size, config.micro_batch_size, ranks.rank, ranks.world)
    items, held_out_items = read_pictures(config, ranks)
    config = config.with_steps(len(items))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    base = load_base(config, ranks.device)
    config = replace(config, precision=base.precision)  # the one that "auto" chose
    if config.full:  # half precision would round small steps away
        base = load_base(replace(config, precision="fp32"), ranks.device)
    if ranks.is_main and base.parameters >= SMALL:
        tell_memory(config, base, ranks.say)
    others = class_pictures(config, base, ranks) if config.has_class_pictures else []
    examples, held_out = encode(config, base, ranks, items, others, held_out_items)
    identity = _identity(config, base, examples) | {"objective": objective.name()}

    unet = base.unet
    # Trained weights keep the usual memory layout, because their optimizer state in a checkpoint has it.
    if ranks.device.type == "cuda" and not config.full:
        unet.to(memory_format=torch.channels_last)
    network = (UNetWithText(unet, base.text_encoders) if config.train_text_encoder else unet).train()
    if config.init_from:
        identity |= load_first_lora(network, config)
    elif not config.full:
        put_new_lora(network, unet, config)
    refuse_differences(identity)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    objective.begin(network, config)
    parameters = trained_parameters(network, config.full)
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert sum(parameter.requires_grad for parameter in network.parameters()) == len(parameters)
    optimizer = make_optimizer(config, parameters, len(trained_parameters(unet, config.full)))
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
    model = torch.compile(network, **compile_options(ranks.device)) if config.compile else network
    # Each process loads the base and draws the same LoRA itself, so only gradients are exchanged.
    if ranks.world > 1:
        model = DistributedDataParallel(model, init_sync=False, forward_sync_buffers=False)
    average = copied_state(network, config.ema_device or ranks.device) if config.ema else {}
    validation = Validation(config, network, base, held_out, ranks, plan) if held_out else None
    parts = plan, base, examples, validation, identity, network, model, parameters, average, optimizer, scaler
    run = Run(config, objective, ranks, *parts)
    introduce(run)
    return run


def check(config: TrainConfig, ranks: Ranks) -> None:
    """Raise UserError if the run would replace an unfinished one, or fail after long work."""
    if not config.resume:
        decided_by_main(lambda: refuse_unfinished(Path(config.output)))
    if config.push_to_hub:
        decided_by_main(lambda: check_login(config.push_to_hub))
    if config.compile:
        check_compiler(ranks.device)


def load_base(config: TrainConfig, device: torch.device) -> Base:
    """Return the base; UserError if the settings do not fit it."""
    base = Base.of(config, device, config.precision, config.base_lora)
    if config.timestep_range and config.timestep_range[1] > len(base.schedule):
        given = ",".join(map(str, config.timestep_range))
        raise UserError(f"--timestep-range is {given}; this base has the timesteps 0 to {len(base.schedule) - 1}")
    base.refuse_inpainting()
    if config.resolution and config.resolution % base.side_multiple:
        raise UserError(f"--resolution is {config.resolution}; this base needs a multiple of {base.side_multiple}")
    return base


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter], of_unet: int) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters; those after the first `of_unet` have the text encoders' learning rate."""
    text_ratio = (config.text_encoder_learning_rate or config.learning_rate) / config.learning_rate
    groups = [{"params": parameters[:of_unet], "ratio": 1.0}, {"params": parameters[of_unet:], "ratio": text_ratio}]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"betas": config.adam_betas, "eps": config.adam_epsilon}
    options["weight_decay"] = config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    if config.optimizer == "prodigy":
        return Prodigy(groups, **options)
    from bitsandbytes.optim import AdamW8bit  # an optional package

    # By default the state of tensors below 4,096 numbers stays in float32, and most matrices of a LoRA are that small.
    return AdamW8bit(groups, **options, min_8bit_size=256)


def introduce(run: Run) -> None:
    """Print what is trained, on what, and how."""
    config, examples, say = run.config, run.examples, run.ranks.say
    seen_at = f"{examples.resolution} × {examples.resolution}"
    if config.buckets:
        seen_at = " and ".join(f"{w} × {h} ({len(inside)})" for (w, h), inside in examples.buckets.items())
    numbers, total = (sum(p.numel() for p in some) for some in (run.parameters, run.network.parameters()))
    on_top = "".join(f" + {lora}" for lora in config.base_lora)
    say(f"base       {run.base.source}{on_top}, {run.base.predicts}, {run.base.computes}")
    say(f"pictures   {len(examples.items)} of {', '.join(config.data)}, at {seen_at} pixels")
    for line in notes(examples):
        say(line)
    if config.validation_share is not None:
        say(f"validation {len(run.validation.held_out.items)} held-out pictures of them")
    if examples.class_items:
        count = len(examples.class_items)
        say(f"class      {count} pictures of {config.class_prompt!r}; every other training picture is one of them")
    if config.recipe:
        say(f"recipe     {config.recipe}: {config.recipe_as_typed() or 'the defaults'}")
    if layers := lora_layers(run.network):
        each = zip(*((a.rank, a.alpha) for layer in layers.values() for a in layer.adapters.values()), strict=True)
        rank, alpha = (f"{min(some):g}" + f" to {max(some):g}" * (len({*some}) > 1) for some in each)
        say(f"LoRA       rank {rank}, alpha {alpha}, in {len(layers)} layers")
    say(f"trained    {numbers:,} of {total:,} parameters")
    say(f"batch      {config.batch_size} = {run.plan}")


def load_first_lora(network: nn.Module, config: TrainConfig) -> dict:
    """Load the LoRA of --init-from; return what it adds to the run's identity, as JSON values."""
    try:
        parts = [folded.component for folded in load_lora(network, config.init_from).folded]
    except UserError as error:
        for_text = not config.train_text_encoder and any(name in str(error) for name in ("text_encoder", "lora_te"))
        hint = " (a LoRA of text encoders needs --train-text-encoder)" if for_text else ""
        raise UserError(f"--init-from: {error}{hint}") from error
    if UNET not in parts or (config.train_text_encoder and len(parts) == 1):
        lacks = "U-Net" if UNET not in parts else "text encoders, which --train-text-encoder would train"
        raise UserError(f"--init-from {config.init_from}: it changes nothing in the {lacks}")
    numbers = b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in lora_parameters(network))
    return {"init_from": hashlib.sha256(numbers).hexdigest()}


def _identity(config: TrainConfig, base: Base, examples: Examples) -> dict:
    """Return everything that determines the result, as JSON values: settings, pictures with captions, base."""
    return config.identity() | {
        "resolution": examples.resolution,
        "schedule": [base.schedule.prediction_type, *base.schedule.alphas_cumprod[[0, -1]].tolist()],
        "pictures": examples.content(),
        "unet": fingerprint(base.unet),
        "vae": examples.vae,
        "text_encoder": examples.text_encoder,
    }
