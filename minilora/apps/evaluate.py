"""Measure drawn pictures: whether they look like a reference, and whether they are mere copies of it.

    python -m minilora.apps.evaluate PICTURES REFERENCE [--lora LORA]

PICTURES is a folder of drawn pictures, as from `sample.py --output FOLDER`, and REFERENCE one of real pictures with
captions.  Four things are measured:

1. The kernel distance between the two distributions, as in KID (likeness.py).  KID takes the features from an Inception
   network; here they are the mean and standard deviation of each channel of the VAE's encoder, divided by their
   standard deviation over the reference.  So figures can be compared only for the same base, and are not the KIDs of
   publications.  The distance between two halves of the reference is printed, too, for comparison.

   With --features, a vision model gives features, too, as in publications (vision.py), and the Fréchet and the kernel
   distance by these are printed.  With DINOv2 (facebook/dinov2-base) the first is FD-DINOv2; with CLIP the second is
   close to CMMD, which has another kernel.  The likeness is the mean cosine between the features of a drawn and of a
   real picture, over all pairs; for a subject, with DINOv2, it is the DINO score of DreamBooth.  Compare figures only
   for the same model, number of pictures and resolution.  With --classifier, an image classifier gives an Inception
   Score.

2. The distance of each picture to the nearest one in the reference, by their latents.  A picture is a copy if the
   nearest is less than a third as far away as the next nearest (Yoon et al., "Diffusion probabilistic models generalize
   when they fail to memorize", 2023).  If the reference is the training set, the LoRA has memorized such pictures.

3. The denoising loss on the reference, at fixed timesteps and noises, without and with --lora.  On held-out pictures
   it falls while the LoRA generalizes, and rises again when the LoRA memorizes its training set.

4. With --drift, how far the LoRA moves pictures that it should leave alone: PROMPTS are drawn without and with it, from
   the same seeds, and the drift is 1 − the mean cosine between the features of each pair.  (The VAE's features are
   first centred on those without the LoRA and divided by their spread; otherwise all pictures would look alike.)
   With PICTURES and REFERENCE, the likeness of the two by the same features is printed, too.
"""

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help answers at once
    from minilora.settings.command_line import evaluate as command

    command()
    raise SystemExit

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from PIL import Image

from ..data.folder import Item, read_folder
from ..data.held_out import held_out_loss
from ..data.pictures import crop_square
from ..data.sheet import save_picture, sheet
from ..models.base import Base
from ..models.device import this_device
from ..models.text import UNetWithText
from ..run.encode import encoded_examples
from ..run.ranks import Ranks
from ..sampling import draw, load_loras, merged_at
from ..settings.errors import UserError
from ..settings.evaluate import EvaluateConfig
from ..settings.sample import SampleConfig
from ..settings.train import TrainConfig
from .likeness import features_of, kernel_distance, latents_of
from .report import write_figures
from .vision import frechet_distance, inception_score, shares_of_classes, vectors_of

# Drawn for --drift; the bundled base knows all of them, too.
PROMPTS = (
    *("apple", "pizza", "dog", "cat", "butterfly", "tulip", "house", "car"),
    *("airplane", "umbrella", "guitar", "alarm clock", "castle", "elephant", "mountain", "ship"),
)
COPY = 1 / 3  # a picture is a copy below this share of the distance to the next nearest
SHOWN = 8  # pictures on the sheet, with their nearest

Pictures = Sequence[Image.Image]
Figures = dict[str, float]


def evaluate(config: EvaluateConfig) -> Figures:
    """Measure pictures, LoRAs or both, as `config` says; write sheets of the compared pictures; return the figures."""
    base = Base.of(config, this_device(), config.precision)
    base.refuse_inpainting()
    strengths = load_loras(base, config.lora)
    items, reference = read_pictures(config) if config.folders else ([], [])
    drawn, real = ([crop_square(item.open(), base.resolution) for item in each] for each in (items, reference))
    figures: Figures = {}
    if config.folders:
        figures |= compared(config, base, drawn, real)
        names = [[item.path.name for item in each] for each in (items, reference)]
        figures |= nearest(config, base, drawn, real, names)
        figures |= losses_on(config, base, reference, strengths)
    if config.drift:
        figures |= drift(config, base, strengths, drawn, real)
    write_figures(Path(config.output), figures)
    return figures


def read_pictures(config: EvaluateConfig) -> tuple[list[Item], list[Item]]:
    """Return the drawn pictures and the reference.  Raises UserError if they are too few to compare."""
    items, reference = (
        read_folder(folder, TrainConfig(data=(folder,), caption=caption), "evaluate")
        for folder, caption in zip(config.folders, ("", config.caption), strict=True)
    )
    for folder, there, least in zip(config.folders, (items, reference), (2, 4), strict=True):
        if len(there) < least:
            raise UserError(f"{folder}: {len(there)} pictures are too few to compare; it needs at least {least}")
    return items, reference


def compared(config: EvaluateConfig, base: Base, drawn: Pictures, real: Pictures) -> Figures:
    """Return how far the drawn pictures are from the real ones, as distributions."""
    seen, wanted = features_of(base, drawn), features_of(base, real)
    spread = wanted.std(0).clamp(min=1e-6)  # (width,)
    seen, wanted = seen / spread, wanted / spread
    figures = {
        "distance of distributions": kernel_distance(seen, wanted),
        "distance of distributions; of the halves of the reference": kernel_distance(wanted[::2], wanted[1::2]),
    }
    if config.features:
        figures |= distances_by(config.features, drawn, real)
    if config.classifier:
        for what, shown in (("", drawn), ("; of the reference", real)):
            shares = shares_of_classes(config.classifier, shown, this_device())
            figures[f"Inception Score by {config.classifier}{what}"] = inception_score(shares)
    return figures


def nearest(config: EvaluateConfig, base: Base, drawn: Pictures, real: Pictures, names: list[list[str]]) -> Figures:
    """Find each drawn picture's nearest real one, write a sheet of both, and return how near and how many are copies.

    `names` are the names of the drawn and of the real pictures' files.
    """
    far = torch.cdist(latents_of(base, drawn), latents_of(base, real))  # (pictures, reference)
    near, which = far.topk(2, dim=1, largest=False)  # (pictures, 2)
    order = (near[:, 0] / near[:, 1]).argsort().tolist()
    print("nearest in the reference, the most likely copies first:")
    for i in order:
        first, second = (names[1][number] for number in which[i])
        print(f"  {names[0][i]} is {near[i, 0]:.3f} from {first}, {near[i, 1]:.3f} from {second}")
    shown = order[:SHOWN]
    rows = [[drawn[i] for i in shown], [real[int(which[i, 0])] for i in shown]]
    columns = [f"{near[i, 0]:.3f}" for i in shown]
    save_picture(sheet(rows, columns, ["picture", "nearest"]), Path(config.output) / "nearest.png")
    return {
        "distance to the nearest in the reference, by their latents": near[:, 0].mean().item(),
        "share of copies": (near[:, 0] < COPY * near[:, 1]).float().mean().item(),
    }


def drift(config: EvaluateConfig, base: Base, strengths: dict[str, float], drawn: Pictures, real: Pictures) -> Figures:
    """Draw PROMPTS without and with the LoRAs, write a sheet of both, and return how far apart they are.

    Also returns the likeness of the `drawn` pictures of a subject to the `real` ones, if there are any.
    """
    print(f"drift on {', '.join(PROMPTS)}")
    drawing, seeds, both = SampleConfig(prompt=PROMPTS, model=config.model), range(len(PROMPTS)), []
    for at in (dict.fromkeys(strengths, 0.0), strengths):
        with merged_at(base, at):
            both.append(draw(base, PROMPTS, seeds, base.resolution, drawing))
    rows = [list(pair) for pair in zip(*both, strict=True)]
    save_picture(sheet(rows, ["base", "LoRA"], PROMPTS), Path(config.output) / "drift.png")
    world = features_of(base, both[0])  # (prompts, width)

    def centred(pictures: Pictures) -> torch.Tensor:
        """Return the features of pictures, of length 1, relative to those that the base draws; (n, width)."""
        return F.normalize((features_of(base, pictures) - world.mean(0)) / world.std(0).clamp(min=1e-6), dim=1)

    near = (centred(both[0]) * centred(both[1])).sum(1)  # (prompts,)
    figures = {"drift by the VAE's features": 1 - near.mean().item()}
    if drawn:
        figures["likeness by the VAE's features"] = (centred(drawn) @ centred(real).T).mean().item()
    if config.features:
        before, after = vectors_of(config.features, both, base.device)
        near = F.cosine_similarity(before, after)
        figures[f"drift by {config.features}"] = 1 - near.mean().item()
    return figures


def distances_by(model: str, drawn: Pictures, real: Pictures) -> Figures:
    """Return likeness and distances by a vision model: of pictures and reference, and of halves of the reference."""
    seen, wanted = vectors_of(model, [drawn, real], this_device())
    if min(len(seen), len(wanted)) <= seen.shape[1]:
        print(
            f"warning: {len(seen)} and {len(wanted)} pictures are too few for {seen.shape[1]} features: the Fréchet "
            "distance is then too large, and the kernel distance is the one to read",
            file=sys.stderr,
        )
    pairs = {"": (seen, wanted), "; of the halves of the reference": (wanted[::2], wanted[1::2])}
    across = F.normalize(seen, dim=1) @ F.normalize(wanted, dim=1).T  # (pictures, reference)
    figures = {f"likeness by {model}": across.mean().item()}
    for which, pair in pairs.items():
        figures[f"Fréchet distance by {model}{which}"] = frechet_distance(*pair)
        figures[f"kernel distance by {model}{which}"] = kernel_distance(*pair)
    return figures


def losses_on(config: EvaluateConfig, base: Base, items: list[Item], strengths: dict[str, float]) -> Figures:
    """Return the denoising loss on pictures, of the base and with the LoRAs, if there are any."""
    losses, ways = {}, {"base": dict.fromkeys(strengths, 0.0)} | ({"with LoRA": strengths} if strengths else {})
    with TemporaryDirectory() as cache:
        # A LoRA may also change the text encoders, so captions are encoded each time.
        seen = TrainConfig(data=config.folders[1:], cache=cache, train_text_encoder=True)
        examples = encoded_examples(items, seen, base.resolution, base, len(base.schedule), Ranks(0, 1, base.device))
        for name, at in ways.items():
            with merged_at(base, at), base.autocast():
                network = UNetWithText(base.unet, base.text_encoders)
                each = held_out_loss(network, examples, base.schedule, range(len(items)))  # (pictures,)
            losses[f"denoising loss on the reference; {name}"] = each.mean().item()
    return losses
