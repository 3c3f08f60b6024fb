r"""Train the bundled miniature Stable Diffusion from scratch.

    python -m minilora.base.build --data base-data --work .cache/base

Four parts, in the order they are made:

    tokenizer      byte-pair encoding of the pictures' names, learnt in a second
    VAE            64 × 64 pixels <-> 16 × 16 latents; learns from drawn pictures and photographs
    text encoder   names -> vectors  \  trained together, from nothing, on the latents of two
    U-Net          denoises latents  /  drawn styles, with the objective of minilora/diffusion.py

Every random draw comes from draws.py and every 200 steps the state goes to --work, so a build that
was stopped goes on where it was.  The result is an ordinary diffusers folder in half precision.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minilora import draws
from minilora.checkpoint import load_optimizer_tensors, optimizer_tensors, under
from minilora.diffusion import Schedule, denoising_loss
from minilora.files import write_tensors
from minilora.pictures import as_tensor, open_picture

from .pictures import DATA_HELP, SEED, SIZE, STYLES, Drawing, caption_at, read_drawings, read_photographs

TOKENS = 32  # per caption

# --------------------------------------------------------------------------------------- the parts


def train_tokenizer(drawings: list[Drawing]) -> CLIPTokenizer:
    """Learn a byte-pair encoding in CLIP's form from the pictures' names."""
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
    captions = [f"{name}, {d.style} style" for d in drawings for name in d.names]
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TOKENS)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
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
        sample_size=SIZE // 4,
        block_out_channels=(128, 192, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=(2, 3, 3),  # diffusers calls the number of heads so
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
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

    The state is kept in `work/<name>.safetensors` and taken up again from there.
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
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save(step + 1)
    return average


def train_vae(drawings: list[Drawing], photographs: list[Image.Image], steps: int, work: Path, device) -> AutoencoderKL:
    """Train the autoencoder on drawn pictures (half) and crops of photographs (half)."""
    vae = make_vae()
    modules = torch.nn.ModuleDict({"vae": vae}).to(device)
    pictures = [open_picture(d.path) for d in drawings if not d.held_out]
    batch = 16

    def crop_at(position: int) -> torch.Tensor:
        """Return a square cut out at random and resized to 64 × 64; (3, 64, 64)."""
        random = draws.generator(SEED, "vae", position)
        source = pictures if position % 2 else photographs
        picture = source[random.integers(len(source))]
        side = min(picture.size)
        side = round(side * (random.uniform(0.7, 1) if position % 2 else random.uniform(0.15, 1)))
        left, top = (random.integers(n - side + 1) for n in picture.size)
        box = (left, top, left + side, top + side)
        crop = as_tensor(picture.resize((SIZE, SIZE), Image.LANCZOS, box=box))
        return crop.flip(-1) if random.random() < 0.5 else crop

    def loss_at(step: int) -> torch.Tensor:
        pixels = torch.stack([crop_at(step * batch + i) for i in range(batch)]).to(device)  # (b, 3, 64, 64)
        noise = torch.stack([draws.gaussian(SEED, "posterior", step * batch + i, (4, 16, 16)) for i in range(batch)])
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            rebuilt = vae.decode(posterior.mean + posterior.std * noise.to(device)).sample
        # The divergence only keeps the latents from drifting far from a unit gaussian.
        divergence = posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()
        return F.mse_loss(rebuilt.float(), pixels) + 3e-5 * 0.5 * divergence.mean()

    vae = fit("vae", modules, loss_at, steps, 1e-3, work)["vae"].eval()
    # Latents are scaled to unit variance, as every Stable Diffusion does.
    sample = torch.stack([as_tensor(p) for p in pictures[::4]]).to(device)
    with torch.no_grad():
        std = torch.cat([vae.encode(part).latent_dist.mean for part in sample.split(64)]).std().item()
    vae.register_to_config(scaling_factor=round(1 / std, 5))
    return vae


def train_unet(drawings, tokenizer, vae, steps: int, work: Path, device):
    """Train text encoder and U-Net together; return the moving averages of both."""
    known = [d for d in drawings if not d.held_out]
    with torch.no_grad():
        pixels = torch.stack([as_tensor(open_picture(d.path)) for d in known])  # (n, 3, 64, 64)
        latents = torch.cat([vae.encode(part.to(device)).latent_dist.mean for part in pixels.split(64)])
        latents = latents * vae.config.scaling_factor  # (n, 4, 16, 16)
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    modules = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(device)
    compiled = torch.compile(unet)  # takes two minutes, and then a step takes two thirds of the time
    schedule = Schedule.of(make_scheduler()).to(device)
    batch = 32

    def loss_at(step: int) -> torch.Tensor:
        positions = range(step * batch, (step + 1) * batch)
        shown = [draws.picture_at(SEED, p, len(known)) for p in positions]
        captions = [caption_at(known[i], p) for i, p in zip(shown, positions, strict=True)]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.stack([draws.gaussian(SEED, "noise", p, latents.shape[1:]) for p in positions])
        # Towards the noisy end, where it is the text that decides what is drawn: density ∝ t.
        timesteps = torch.tensor([int(len(schedule) * draws.uniform(SEED, "timestep", p) ** 0.5) for p in positions])
        # The plain form of attention: on a CPU its backward pass is faster than the fused one here.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, torch.bfloat16):
            text = text_encoder(tokens.to(device)).last_hidden_state  # (b, 32, 192)
            return denoising_loss(
                compiled, latents[shown], text, noise.to(device), timesteps.to(device), schedule
            ).mean()

    average = fit("unet", modules, loss_at, steps, 8e-4, work)
    return average["unet"].eval(), average["text_encoder"].eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minilora.base.build",
        description="Train the bundled miniature Stable Diffusion from scratch.",
        epilog=DATA_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("base-data"), help="folder of the unpacked data packages")
    parser.add_argument("--work", type=Path, default=Path(".cache/base"), help="folder of the build's own checkpoints")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where the base is written")
    parser.add_argument("--vae-steps", type=int, default=2800, help="steps of 16 pictures")
    parser.add_argument("--steps", type=int, default=30000, help="steps of 32 pictures for U-Net and text encoder")
    args = parser.parse_args()
    needed = [f"emoji-datasource-{package}" for package in STYLES.values()] + ["lomiri"]
    if missing := [name for name in needed if not (args.data / name).is_dir()]:
        print(f"error: {args.data} lacks {', '.join(missing)}\n\n{DATA_HELP}", file=sys.stderr)
        sys.exit(2)

    torch.manual_seed(SEED)  # the networks' first weights
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drawings = read_drawings(args.data)
    held_out = sum(d.held_out for d in drawings)
    print(f"{len(drawings)} drawn pictures, {held_out} of them held out")
    # Kept too: learnt anew, equally frequent pieces could come in another order, and the text encoder not know them.
    kept = args.work / "tokenizer"
    if not kept.exists():
        train_tokenizer(drawings).save_pretrained(kept)
    tokenizer = CLIPTokenizer.from_pretrained(kept)
    vae = train_vae(drawings, read_photographs(args.data), args.vae_steps, args.work, device)
    unet, text_encoder = train_unet(drawings, tokenizer, vae, args.steps, args.work, device)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16).save_pretrained(args.output)
    # Half precision is for the download; without this line transformers would compute in it too.
    config = args.output / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    print(f"wrote {args.output}; python -m minilora.base.measure prints its figures")


if __name__ == "__main__":
    main()
