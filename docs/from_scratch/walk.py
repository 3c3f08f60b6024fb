"""Follow one picture through the U-Net of unet.py, and put what it looks like on the way on a sheet.

python docs/from_scratch/walk.py dataset/mountain/mountain.jpg --prompt mountain --output docs/pictures/from_scratch.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from unet import UNet

from minilora.data.pictures import as_picture, as_tensor, crop_square, open_picture
from minilora.data.sheet import save_picture, sheet
from minilora.diffusion import add_noise, clean_and_noise
from minilora.models.base import Base
from minilora.settings.setting import BUNDLED

TIMESTEPS = (200, 500, 800)  # of 1000: a little noise, much, hardly anything else
BLOCKS = {  # what is shown of the U-Net: after which residual block
    "conv_in": "conv_in",
    **{f"down {n}": f"down_blocks.{n}.resnets.0" for n in range(3)},
    "mid": "mid_block.resnets.1",
    **{f"up {n}": f"up_blocks.{n}.resnets.1" for n in range(3)},
}


def as_grey(channel: torch.Tensor, side: int) -> Image.Image:
    """Return one channel, (h, w), as a picture, black at its lowest and white at its highest value."""
    low, high = channel.min(), channel.max()
    grey = ((channel - low) / (high - low).clamp(min=1e-6) * 255).byte().numpy()
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=2)).resize((side, side), Image.Resampling.NEAREST)


@torch.no_grad()
def walk(picture: Image.Image, prompt: str) -> Image.Image:
    """Return a sheet with a row for each timestep: from the picture to the picture that the prediction implies."""
    base, unet = Base(None, torch.device("cpu")), UNet.load(BUNDLED / "unet").eval()
    side, seen = base.resolution, {}
    for name, path in BLOCKS.items():
        unet.get_submodule(path).register_forward_hook(lambda module, given, out, name=name: seen.update({name: out}))
    picture, text = crop_square(picture, side), base.encode_text(prompt)[None]  # (1, tokens, width)
    latents = base.encode_picture(as_tensor(picture))[0][None]  # (1, 4, h, w)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))

    rows = []
    for timestep in TIMESTEPS:
        t = torch.tensor([timestep])
        x = add_noise(latents, noise, t, base.schedule)  # (1, 4, h, w)
        predicted = unet(x, t, text)  # (1, 4, h, w)
        clean, _ = clean_and_noise(predicted, x, base.schedule.alpha_bar(t), base.schedule.prediction_type)
        inside = [as_grey(seen[name][0].abs().mean(0), side) for name in BLOCKS]  # the mean over the channels
        decoded = [as_picture(base.decode_latents(some)[0]) for some in (x, clean)]
        rows.append(
            [picture, as_grey(latents[0, 0], side), decoded[0], *inside, as_grey(predicted[0, 0], side), decoded[1]]
        )
    columns = ["picture", "latent", "with noise", *BLOCKS, "prediction", "picture again"]
    return sheet(rows, columns, [f"t = {timestep}" for timestep in TIMESTEPS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--prompt", default="mountain")
    parser.add_argument("--output", type=Path, default=Path("out/from_scratch.png"))
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_picture(walk(open_picture(args.picture), args.prompt), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
