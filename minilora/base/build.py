r"""Train the bundled miniature Stable Diffusion from scratch.

    python -m minilora.base.build --data base-data --work .cache/base

It makes four parts, in this order:

    tokenizer      byte-pair encoding of the things' names, learnt in a second
    VAE            128 × 128 pixels <-> 16 × 16 latents; learns from drawings and photographs
    text encoder   names -> vectors  \  trained together on the latents of a few hundred
    U-Net          denoises latents  /  things, each drawn in three styles

All random draws come from data/draws.py, and the state is saved in --work every 200 steps, so a stopped build resumes
from there.  The result is an ordinary diffusers folder in half precision.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minilora.data import draws
from minilora.diffusion import Conditioning, Schedule, denoising_loss
from minilora.files.tensors import write_tensors
from minilora.models.device import this_device
from minilora.run.checkpoint import load_optimizer_tensors, optimizer_tensors, under

from .pictures import (
    DATA_HELP,
    SEED,
    SIZE,
    STYLES,
    Drawing,
    Thing,
    caption_at,
    is_held_out,
    read_drawings,
    read_photographs,
    read_style,
    read_things,
    refuse_missing,
)

TOKENS = 32  # per caption
SAVE_EVERY = 200  # steps

# --------------------------------------------------------------------------------------- the parts


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


SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}


def make_scheduler(schedule: str = "scaled_linear") -> DDIMScheduler:
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


# ------------------------------------------------------------------------------------ the training


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Warm up over 100 steps, hold, then fall linearly to a fiftieth over the last third."""
    warm_up = min(1.0, (step + 1) / 100)
    fall = min(1.0, 3 * (1 - step / steps))
    return peak * warm_up * max(fall, 0.02)


def fit(name: str, modules: torch.nn.ModuleDict, loss_at, steps: int, learning_rate: float, work: Path):
    """Train `modules` for `steps` steps of `loss_at(step)` and return their moving average.

    The state is saved in `work/<name>.safetensors`, and training resumes from there, even with more `steps`.
    """
    path = work / f"{name}.safetensors"
    average = copy.deepcopy(modules).requires_grad_(False)
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first = 0
    if path.exists():
        state = load_file(path)
        first = int(state.pop("step"))
        modules.load_state_dict(under(state, "now."))
        average.load_state_dict(under(state, "average."))
        load_optimizer_tensors(optimizer, under(state, "adam."))

    def save(step: int) -> None:
        state = {f"now.{k}": v for k, v in modules.state_dict().items()}
        state |= {f"average.{k}": v for k, v in average.state_dict().items()}
        state |= {f"adam.{k}": v for k, v in optimizer_tensors(optimizer).items()}
        state = {key: value.cpu() for key, value in state.items()}
        write_tensors(path, state | {"step": torch.tensor(step)}, {})

    recent = None
    progress = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=5)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, learning_rate)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))  # early on, forget the random start quickly
        for kept, new in zip(average.parameters(), parameters, strict=True):
            kept.lerp_(new.detach(), 1 - decay)
        recent = loss.item() if recent is None else 0.98 * recent + 0.02 * loss.item()
        progress.set_postfix(loss=f"{recent:.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save(step + 1)
    return average


def as_pixels(pictures: list[np.ndarray]) -> torch.Tensor:
    """Return pictures of bytes as float32 in [-1, 1], (n, 3, h, w)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def patch_at(position: int, side: int, drawn: list[np.ndarray], photographs: list[np.ndarray]) -> np.ndarray:
    """Return the VAE's training square at a position, (side, side, 3); at even positions it is from a drawing."""
    random = draws.generator(SEED, "vae", position)
    if position % 2 == 0:
        picture = drawn[random.integers(len(drawn))]
        if side == SIZE:
            picture = np.roll(picture, random.integers(-8, 9, 2), (0, 1))
    else:
        picture = photographs[random.integers(len(photographs))]
    for _ in range(4):  # a white square teaches nothing, so try other crops
        top, left = (random.integers(n - side + 1) for n in picture.shape[:2])
        patch = picture[top : top + side, left : left + side]
        if side == SIZE or (patch.min(axis=2) < 245).mean() > 0.4:
            break
    if position % 2 and random.random() < 0.5:  # the photographs are few, so their light and colours vary
        patch = (patch * random.uniform(0.6, 1.2)).clip(0, 255).astype(np.uint8)
        patch = patch[..., random.permutation(3)] if random.random() < 0.5 else patch
    return patch[:, ::-1] if random.random() < 0.5 else patch


def train_vae(drawn: list[np.ndarray], photographs: list[np.ndarray], work: Path, device, precision, args):
    """Train the autoencoder: every other step on patches of 64 pixels, which cost a quarter and tell nearly as much.

    With `--start`, its VAE is trained further, and the latents of drawings stay where the U-Net knows them.
    """
    torch.manual_seed(SEED)  # the first weights
    vae = load_vae(args.start) if args.start else make_vae()
    first = copy.deepcopy(vae).requires_grad_(False).to(device)  # --start's, whose latents the U-Net knows
    modules = torch.nn.ModuleDict({"vae": vae}).to(device)

    def loss_at(step: int) -> torch.Tensor:
        count, side = (4, SIZE) if step % 2 else (16, SIZE // 2)
        positions = range(step * 16, step * 16 + count)
        patches = [patch_at(p, side, drawn, photographs) for p in positions]
        pixels = as_pixels(patches).to(device)  # (count, 3, side, side)
        noise = torch.stack([draws.gaussian(SEED, "posterior", p, (4, side // 8, side // 8)) for p in positions])
        share = torch.tensor([0.3 * draws.uniform(SEED, "share", p) for p in positions]).view(-1, 1, 1, 1)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            posterior = vae.encode(pixels).latent_dist
            # More noise than the posterior's: latents that a U-Net draws are never exact, and must not become stains.
            spread = posterior.std + share.to(device) * posterior.mean.detach().std()
            error = vae.decode(posterior.mean + spread * noise.to(device)).sample.float() - pixels
        # Squares of single pixels say little about the colour of an area: with them alone, grass turns grey.
        areas = F.avg_pool2d(error, 8).square().mean()
        # The divergence only keeps the latents from drifting far from a unit gaussian.
        divergence = posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()
        loss = error.square().mean() + 0.1 * error.abs().mean() + 4 * areas + 3e-5 * 0.5 * divergence.mean()
        if args.start and side == SIZE:
            known = first.encode(pixels[::2]).latent_dist.mean  # of the drawings
            loss = loss + 0.05 * (posterior.mean[::2].float() - known).square().mean() / known.var()
        return loss

    vae = fit("vae", modules, loss_at, args.vae_steps, 8e-4 if args.start else 1.5e-3, work)["vae"].eval()
    if not args.start:
        # Latents are scaled so that their variance is 1, as in every Stable Diffusion.
        sample = as_pixels(drawn[:: max(1, len(drawn) // 500)]).to(device)
        vae.register_to_config(scaling_factor=round(1 / encode(vae, sample).std().item(), 5))
    return vae


def load_vae(folder: Path) -> AutoencoderKL:
    """Return a base's VAE, which has the shape of `make_vae`'s."""
    vae = make_vae()
    vae.load_state_dict(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    settings = json.loads((folder / "vae" / "config.json").read_text())
    vae.register_to_config(scaling_factor=settings["scaling_factor"])
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Return the means of the latents, not multiplied by the scaling factor, (n, 4, 16, 16)."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])


def train_unet(drawings: list[Drawing], tokenizer, vae, steps: int, work: Path, device, precision, args):
    """Train text encoder and U-Net together; return the moving averages of both."""
    # Each drawing has one place and size: such a small network draws sharply only what it has seen often.
    latents = encode(vae, as_pixels([drawing.pixels for drawing in drawings]).to(device))
    latents = latents * vae.config.scaling_factor  # (drawings, 4, 16, 16)
    torch.manual_seed(SEED)  # the first weights
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    if args.start:
        unet.load_state_dict(load_file(args.start / "unet" / "diffusion_pytorch_model.safetensors"))
        text_encoder.load_state_dict(load_file(args.start / "text_encoder" / "model.safetensors"))
    modules = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(device)
    network = torch.compile(unet) if args.compile else unet
    schedule = Schedule.of(make_scheduler(args.schedule)).to(device)
    batch = 32

    def loss_at(step: int) -> torch.Tensor:
        positions = range(step * batch, (step + 1) * batch)
        shown = [draws.picture_at(SEED, p, len(drawings)) for p in positions]
        captions = [caption_at(drawings[i], p) for i, p in zip(shown, positions, strict=True)]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.stack([draws.gaussian(SEED, "noise", p, latents.shape[1:]) for p in positions])
        # Noisy timesteps, where the text decides what is drawn, come more often: the density is proportional to t.
        timesteps = torch.tensor([int(len(schedule) * draws.uniform(SEED, "timestep", p) ** 0.5) for p in positions])
        # Plain attention: on a CPU its backward pass is faster here than that of fused attention.
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.autocast(device.type, precision, enabled=precision != torch.float32),
        ):
            text = Conditioning(text_encoder(tokens.to(device)).last_hidden_state)  # (b, 32, 192)
            clean = latents[shown]  # (b, 4, 16, 16)
            return denoising_loss(network, clean, text, noise.to(device), timesteps.to(device), schedule).mean()

    name = "unet" if args.schedule == "scaled_linear" else f"unet-{args.schedule}"  # another run in the same --work
    average = fit(name, modules, loss_at, steps, args.learning_rate, work)
    return average["unet"].eval(), average["text_encoder"].eval()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m minilora.base.build",
        description="Train the bundled miniature Stable Diffusion from scratch.",
        epilog=DATA_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", default=Path("base-data"), help="folder of the unpacked data packages"
    )
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", default=Path(".cache/base"), help="folder of the build's own checkpoints"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", default=Path(__file__).parent, help="where the base is written"
    )
    parser.add_argument(
        "--vae-steps",
        type=int,
        metavar="STEPS",
        default=5400,
        help="steps of 16 patches or 4 whole pictures (default 5400); 0 takes the VAE of --start as it is",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="STEPS",
        default=12000,
        help="steps of 32 pictures for U-Net and text encoder (default 12000)",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        default=6e-4,
        help="highest learning rate of those steps (default 0.0006)",
    )
    parser.add_argument(
        "--schedule", choices=SCHEDULES, default="scaled_linear", help="noise levels (default scaled_linear)"
    )
    parser.add_argument("--things", type=int, metavar="N", help="number of things of things.txt; if not given, all")
    parser.add_argument(
        "--start",
        type=Path,
        metavar="FOLDER",
        help="diffusers folder whose VAE, text encoder and U-Net are trained further, with its tokenizer",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the U-Net (default on); a step takes two thirds of the time",
    )
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast to bfloat16 (default on)"
    )
    args = parser.parse_args(words)
    if not (args.vae_steps or args.start):
        parser.error("--vae-steps 0 needs --start, which has a VAE")
    if args.start and not (args.start / "unet").is_dir():
        parser.error(f"--start {args.start}: it is not a diffusers folder")
    refuse_missing(args.data, "lomiri/usr/share/backgrounds")
    return args


def main(words: list[str] | None = None) -> None:
    args = parse(words)
    device = this_device()
    precision = torch.bfloat16 if args.bf16 else torch.float32
    styles = {style: read_style(args.data, style, args.work) for style in STYLES}
    things = read_things(args.things)
    drawings = read_drawings(styles, things)
    drawn = [pixels for pictures in styles.values() for icon, pixels in pictures.items() if not is_held_out(icon)]
    print(f"{len(things)} things in {len(drawings)} drawings; the VAE learns from {len(drawn)}")
    # The tokenizer is saved, too: if it were learnt again, equally frequent pieces could get other ids.
    kept = args.start / "tokenizer" if args.start else args.work / "tokenizer"
    if not kept.exists():
        train_tokenizer(read_things()).save_pretrained(kept)
    tokenizer = CLIPTokenizer.from_pretrained(kept)
    if args.vae_steps:
        vae = train_vae(drawn, read_photographs(args.data), args.work, device, precision, args)
    else:
        vae = load_vae(args.start).requires_grad_(False).to(device)
    unet, text_encoder = train_unet(drawings, tokenizer, vae, args.steps, args.work, device, precision, args)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(args.schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16).save_pretrained(args.output)
    (args.output / "captions.txt").write_text("".join(f"{thing.names[0]}\n" for thing in things))  # what it knows
    # Half precision only makes the download smaller; without this line transformers would also compute in it.
    config = args.output / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    print(f"wrote {args.output}; python -m minilora.base.measure prints its figures")


if __name__ == "__main__":
    main()
