"""The four parts of the bundled base as they are before training, and the noise levels."""

import json
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .pictures import SIZE, STYLES, Thing

TOKENS = 32  # per caption
SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}


def train_tokenizer(things: list[Thing]) -> CLIPTokenizer:
    """Learn a byte-pair encoding in CLIP's form from the things' names."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(r"\s+", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    captions = [f"a {name}, {style} style" for thing in things for name in thing.names for style in STYLES]
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TOKENS)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def load_vae(folder: Path) -> AutoencoderKL:
    """Return a base's VAE, which has the shape of `make_vae`'s."""
    vae = make_vae()
    vae.load_state_dict(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    settings = json.loads((folder / "vae" / "config.json").read_text())
    vae.register_to_config(scaling_factor=settings["scaling_factor"])
    return vae


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=TOKENS,
            projection_dim=192,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    # One transformer at 16 × 16, on the way down: the two on the way up would double a step's cost.
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(128, 192, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=(2, 3, 3),  # despite its name in diffusers, the number of heads
    )


def make_scheduler(schedule: str) -> DDIMScheduler:
    """Return the noise levels of a base; `schedule` is one of SCHEDULES, whose values are diffusers' names."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": SCHEDULES[schedule]}
    if schedule == "sigmoid":  # only DDPMScheduler knows this name
        betas = {"trained_betas": DDPMScheduler(**betas).betas.tolist()}
    return DDIMScheduler(
        **betas,
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
