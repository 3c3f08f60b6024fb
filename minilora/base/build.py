r"""Train the bundled miniature Stable Diffusion from scratch.

    python -m minilora.base.build --data base-data --work .cache/base

It trains four parts, in this order:

    tokenizer      byte-pair encoding of the things' names, learnt in a second
    VAE            128 × 128 pixels <-> 16 × 16 latents; learns from drawings and photographs
    text encoder   names -> vectors  \  trained together on the latents of a few hundred
    U-Net          denoises latents  /  things, each drawn in three styles
    VAE's decoder  once more, against a critic, so that pictures are crisp

parts.py makes them; fit.py and decoder.py train them.  The result is an ordinary diffusers folder in half precision.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from minilora.files.tensors import TensorFile
from minilora.models.device import this_device
from minilora.models.fingerprint import hash_of_files

from .command_line import command_line, refuse_missing
from .decoder import train_decoder
from .fit import train_unet, train_vae
from .parts import SCHEDULES, load_vae, make_scheduler, train_tokenizer
from .pictures import STYLES, is_held_out, read_drawings, read_photographs, read_style, read_things


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return the settings of a command line; end the program if they do not fit what is in the folders."""
    parser = command_line(
        "build",
        "Train the bundled miniature Stable Diffusion from scratch.",
        {
            "work": (Path(".cache/base"), "folder of the build's own checkpoints"),
            "output": (Path(__file__).parent, "where the base is written"),
            "start": (
                None,
                "diffusers folder whose VAE, text encoder and U-Net are trained further, with its tokenizer",
            ),
        },
    )
    for name, metavar, default, text in (
        ("vae-steps", "STEPS", 5400, "steps of 16 patches or 4 whole pictures; 0 takes the VAE of --start as it is"),
        ("steps", "STEPS", 12000, "steps of 32 pictures for U-Net and text encoder"),
        ("learning-rate", "RATE", 6e-4, "highest learning rate of those steps"),
        ("decoder-steps", "STEPS", 3600, "steps of 6 pictures or 20 patches for the decoder against its critic"),
    ):
        parser.add_argument(
            f"--{name}", type=type(default), metavar=metavar, default=default, help=f"{text} (default {default})"
        )
    parser.add_argument(
        "--schedule", choices=SCHEDULES, default="scaled_linear", help="noise levels (default scaled_linear)"
    )
    parser.add_argument("--things", type=int, metavar="N", help="number of things of things.txt; if not given, all")
    switch: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument(
        "--compile", **switch, help="compile the U-Net (default on); a step takes two thirds of the time"
    )
    parser.add_argument("--bf16", **switch, help="autocast to bfloat16 (default on)")
    args = parser.parse_args(words)
    if not (args.vae_steps or args.start):
        parser.error("--vae-steps 0 needs --start, which has a VAE")
    if args.start and not (args.start / "unet").is_dir():
        parser.error(f"--start {args.start}: it is not a diffusers folder")
    refuse_missing(args.data, "lomiri/usr/share/backgrounds")

    # A state in --work must have begun where this build begins.
    weights = [TensorFile(path) for path in sorted(args.start.glob("*/*.safetensors"))] if args.start else []
    args.start_content = hash_of_files(weights) if weights else ""
    noise_levels = "" if args.schedule == "scaled_linear" else f"-{args.schedule}"  # other ones are another run
    args.vae_state, args.unet_state = args.work / "vae.safetensors", args.work / f"unet{noise_levels}.safetensors"
    args.redrawn_state = args.work / f"redrawn{noise_levels}-{args.steps}.safetensors"
    args.decoder_state = args.work / f"decoder{noise_levels}.safetensors"
    later = (args.unet_state, args.redrawn_state, args.decoder_state)
    for path in (args.vae_state, *later) if args.vae_steps else later:
        if path.exists() and TensorFile(path).metadata.get("start", "") != args.start_content:
            start = f"--start {args.start}" if args.start else "random weights"
            parser.error(f"{path} holds a build that did not begin from {start}; choose another --work, or delete it")
    return args


def main(words: list[str] | None = None) -> None:
    args = parse(words)
    device = this_device()
    styles = {style: read_style(args.data, style, args.work) for style in STYLES}
    things = read_things(args.things)
    drawings = read_drawings(styles, things)
    drawn = [pixels for pictures in styles.values() for icon, pixels in pictures.items() if not is_held_out(icon)]
    print(f"{len(things)} things in {len(drawings)} drawings; the VAE learns from {len(drawn)}")
    # The tokenizer is saved, too: if it were learnt again, equally frequent pieces could get other ids.
    kept = (args.start or args.work) / "tokenizer"
    if not kept.exists():
        train_tokenizer(read_things()).save_pretrained(kept)
    tokenizer = CLIPTokenizer.from_pretrained(kept)
    photographs = read_photographs(args.data)
    if args.vae_steps:
        vae = train_vae(drawn, photographs, device, args)
    else:
        vae = load_vae(args.start).requires_grad_(False).to(device)
    trained = train_unet(drawings, tokenizer, vae, device, args)
    if args.decoder_steps:
        vae = train_decoder(vae, trained, drawings, drawn, photographs, tokenizer, device, args)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=trained["text_encoder"],
        tokenizer=tokenizer,
        unet=trained["unet"],
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
