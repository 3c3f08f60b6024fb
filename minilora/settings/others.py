"""Translate the settings of other programs to train.py's: diffusers' scripts, kohya's, and articles that follow them.

Most of their names agree, so one table holds all of them.  A setting without a counterpart is ignored, and named, if
it only affects speed or logging.  If it would change the result, it is an error, unless it is off.
"""

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_THEIRS = {  # our names, and theirs for the same setting
    "model": "pretrained_model_name_or_path",
    "data": "data_dir train_data_dir instance_data_dir dataset_name",
    "caption": "instance_prompt",
    "class_data": "class_data_dir",
    "class_pictures": "num_class_images",
    "prior_weight": "prior_loss_weight",
    "max_pictures": "max_train_samples",
    "mirror": "random_flip flip_aug",
    "buckets": "enable_bucket",
    "caption_dropout": "caption_dropout_rate",
    "rank": "network_dim",
    "alpha": "lora_alpha network_alpha",
    "init_from": "network_weights",
    "epochs": "n_epochs num_train_epochs max_train_epochs",
    "steps": "max_train_steps",
    "learning_rate": "unet_lr",
    "text_encoder_learning_rate": "text_encoder_lr",
    "lr_schedule": "lr_scheduler lr_scheduler_name",
    "lr_cycles": "lr_num_cycles lr_scheduler_num_cycles",
    "lr_power": "lr_scheduler_power",
    "warmup_steps": "lr_warmup_steps",
    "weight_decay": "adam_weight_decay",
    "optimizer": "optimizer_type",
    "snr_gamma": "min_snr_gamma",
    "precision": "mixed_precision",
    "micro_batch_size": "train_batch_size",
    "output": "output_dir",
    "checkpoint_every": "checkpointing_steps save_every_n_steps",
    "checkpoints_kept": "checkpoints_total_limit",
    "resume": "resume_from_checkpoint",
    "sample_prompt": "validation_prompt",
    "push_to_hub": "hub_model_id",
}
RENAMED = {theirs: ours for ours, names in _THEIRS.items() for theirs in names.split()}
# Settings that belong together, or have another form here: `translated` reads these one by one.
READ = {"gradient_accumulation_steps", "adam_beta1", "adam_beta2", "center_crop", "random_crop", "use_8bit_adam"}
READ |= {"v_parameterization", "network_train_unet_only", "with_prior_preservation", "push_to_hub"}
UNCHANGING = {  # settings without a counterpart, and the values at which they change nothing here
    "network_module": ("networks.lora",),
    "clip_skip": (1,),
    "max_token_length": (75,),
    "bucket_reso_steps": (64,),
    "caption_extension": (".txt",),
    "loss_type": ("l2",),
    "max_timestep": (1000,),
    "min_bucket_reso": (256,),
    "max_bucket_reso": (1024, 2048),
    "image_interpolation_mode": ("lanczos",),
    "dataset_config_name": ("default",),
}
WITHOUT_EFFECT = re.compile(  # on the result of training
    r"ckpt_name|output_name|save_.*|metadata_.*|no_metadata|training_comment|hub_.*|huggingface_.*|"
    r"logging_dir|log_.*|report_to|tracker_.*|wandb_.*|console_.*|"
    r"num_validation_images|validation_(epochs|steps)|sample_(prompts|sampler|at_first|every_.*|batch_size)|"
    r"cache_.*|.*num_workers|.*loader.*|vae_batch_size|local_rank|ddp_.*|v2|prior_generation_precision|"
    r"allow_tf32|enable_xformers.*|xformers|sdpa|mem_eff_attn|lowram|highvram|set_grads_to_none|pre_compute_.*"
)


def translated(values: Mapping[str, Any], ours: Collection[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return another program's settings under our names, the names without effect here, and a list of problems.

    `ours` are our names; a file that uses only these is returned unchanged.
    """
    flat = {name: value for name, value in values.items() if not isinstance(value, dict)}
    for section in values.values():  # kohya's TOML may have sections; their names mean nothing
        flat |= section if isinstance(section, dict) else {}
    if not any(name in RENAMED or name in READ for name in flat if name not in ours):
        return dict(values), [], []
    given = {name: value for name, value in flat.items() if value not in (None, "")}
    nothing, wrong = [], []
    result: dict[str, Any] = {}
    for name, value in given.items():
        if name in RENAMED or (name in ours and name not in READ):
            result[RENAMED.get(name, name)] = value
        elif name in READ or value in (False, 0, [], {}) or value in UNCHANGING.get(name, ()):
            continue
        elif WITHOUT_EFFECT.fullmatch(name):
            nothing.append(name)
        else:
            wrong.append(f"{name} = {json.dumps(value, default=str)} has no counterpart, and may change what is learnt")

    batch = [given.get("train_batch_size", 1), given.get("gradient_accumulation_steps", 1)]
    if not all(type(number) is int and number > 0 for number in batch):
        wrong.append("train_batch_size and gradient_accumulation_steps should be whole numbers above 0")
    elif {"train_batch_size", "gradient_accumulation_steps"} & given.keys():
        result["batch_size"] = math.prod(batch) * int(os.environ.get("WORLD_SIZE", "1"))
    if {"adam_beta1", "adam_beta2"} & given.keys():
        result["adam_betas"] = [given.get("adam_beta1", 0.9), given.get("adam_beta2", 0.999)]
    if {"center_crop", "random_crop"} & given.keys():
        result["crop"] = "center" if given.get("center_crop", not given.get("random_crop")) else "random"
    if given.get("use_8bit_adam"):
        result["optimizer"] = "adamw8bit"
    if given.get("v_parameterization"):
        result["prediction_type"] = "v_prediction"
    if {"network_module", "network_dim"} & given.keys():  # kohya's, with kohya's defaults
        result = {"rank": 4, "alpha": 1.0} | result
        result["learning_rate"] = given.get("unet_lr", given.get("learning_rate", 2e-6))
        result["train_text_encoder"] = not given.get("network_train_unet_only") and given.get("text_encoder_lr") != 0
        if not result["train_text_encoder"]:
            result.pop("text_encoder_learning_rate", None)
    if given.get("with_prior_preservation") is False:
        result = {name: value for name, value in result.items() if not name.startswith(("class_", "prior_"))}
    if not given.get("push_to_hub"):
        result.pop("push_to_hub", None)
    elif "push_to_hub" not in result:
        wrong.append("push_to_hub needs hub_model_id, as OWNER/NAME")
    if "steps" in result and "epochs" in result:  # kohya's program follows the epochs, diffusers' the steps
        result.pop("steps" if "max_train_epochs" in given else "epochs")
    if "sample_prompt" in result:
        result.setdefault("sample_every", result.get("checkpoint_every", 500))
    result |= {name: read(result[name]) for name, read in _FORMS.items() if name in result}
    share, steps = result.get("warmup_steps"), result.get("steps")
    if isinstance(share, float) and share < 1 and steps:  # kohya's warm-up may be a share of the run
        result["warmup_steps"] = round(share * steps)
    return result, nothing, wrong


# ------------------------------------------------------------------------- values in another form


def _folders(name: Any) -> Any:
    """Return kohya's folders of pictures with their weights: the pictures in 10_dog come ten times per epoch."""
    names = name if isinstance(name, list) else [name]
    inside = sorted(Path(str(names[0])).glob("*_*")) if len(names) == 1 else []
    found = [f"{path}:{path.name.split('_')[0]}" for path in inside if re.match(r"\d+_", path.name) and path.is_dir()]
    return found or names


def _side(value: Any) -> Any:
    sides = {*map(int, re.findall(r"\d+", str(value)))}
    return sides.pop() if len(sides) == 1 else value


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


_FORMS = {
    "data": _folders,
    "resolution": _side,
    "lr_schedule": lambda name: "constant" if name == "constant_with_warmup" else name,
    "optimizer": lambda name: str(name).lower(),
    "precision": lambda name: "fp32" if name == "no" else name,
    "resume": lambda name: True if name == "latest" else name,
    "sample_prompt": lambda text: text if isinstance(text, list) else [text],
    **dict.fromkeys(("learning_rate", "text_encoder_learning_rate", "alpha", "snr_gamma", "noise_offset"), _number),
}
