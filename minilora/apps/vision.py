"""Vision models: feature vectors of pictures, the Fréchet distance between two sets of them, the Inception Score.

Any transformers model in safetensors works that turns a picture into one vector: DINOv2, CLIP, ViT.  The Fréchet
distance treats each set of vectors, with mean μ and covariance S, as a gaussian:

    d² = ‖μ₁ − μ₂‖² + tr(S₁ + S₂ − 2 (S₁ S₂)^½)

With the features of Inception it is FID; with those of DINOv2 it is FD-DINOv2, which agrees better with human judges.

The Inception Score needs a classifier: it is high if each picture x clearly has one class y, and all classes occur,

    IS = exp(mean over x of Σ p(y|x) log(p(y|x) / p(y)))        p(y) = mean over x of p(y|x)

from 1 to the number of classes.

Sources: Salimans et al., "Improved techniques for training GANs", 2016; Heusel et al., "GANs trained by a two
time-scale update rule converge to a local Nash equilibrium", 2017; Stein et al., "Exposing flaws of generative model
evaluation metrics and their unfair treatment of diffusion models", 2023.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from ..settings.errors import UserError, first_line

TOGETHER = 16  # pictures encoded in one pass


@torch.no_grad()
def vectors_of(name: str, sets: Sequence[Sequence[Image.Image]], device: torch.device) -> list[torch.Tensor]:
    """Return the feature vectors of sets of pictures, (pictures, width) each; `name` is the model's folder or hub id.

    Raises UserError if the model cannot be loaded.
    """
    processor, model, has_pooler = _load(AutoModel, f"--features {name}", name, device)
    look = getattr(model, "get_image_features", model)  # CLIP itself also wants texts

    def see(pictures: Sequence[Image.Image]) -> torch.Tensor:
        seen = look(pixel_values=processor(images=list(pictures), return_tensors="pt").pixel_values.to(device))
        return (seen.pooler_output if has_pooler else seen.last_hidden_state[:, 0]).cpu()  # (pictures, width)

    return [torch.cat([see(one[i : i + TOGETHER]) for i in range(0, len(one), TOGETHER)]) for one in sets]


@torch.no_grad()
def shares_of_classes(name: str, pictures: Sequence[Image.Image], device: torch.device) -> torch.Tensor:
    """Return a classifier's probability of each class for each picture, (pictures, classes); each row sums to 1.

    Raises UserError if the classifier cannot be loaded.
    """
    processor, model, _ = _load(AutoModelForImageClassification, f"--classifier {name}", name, device)
    shares = []
    for start in range(0, len(pictures), TOGETHER):
        seen = processor(images=list(pictures[start : start + TOGETHER]), return_tensors="pt").pixel_values
        shares.append(model(pixel_values=seen.to(device)).logits.double().softmax(-1).cpu())
    return torch.cat(shares)


def _load(kind: Any, title: str, name: str, device: torch.device) -> tuple[Any, Any, bool]:
    """Return a model's picture processor, the model, and whether its file has a pooler."""
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        options = {"dtype": torch.float32, "output_loading_info": True}
        model, about = kind.from_pretrained(name, use_safetensors=True, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{title}: {first_line(error)}") from error
    # A pooler that the file lacks would have random weights; then the first token is taken as the picture's vector.
    lacks = sorted(about["missing_keys"])
    has_pooler = not any(key.startswith("pooler.") for key in lacks)
    if lacks := [key for key in lacks if not key.startswith("pooler.")]:
        raise UserError(f"{title}: {len(lacks)} weights are missing in the file, for example {lacks[0]}")
    return processor, model.eval().to(device), has_pooler


def inception_score(shares: torch.Tensor) -> float:
    """Return the Inception Score of shares of classes, (pictures, classes), in float64."""
    return torch.special.entr(shares.mean(0)).sum().sub(torch.special.entr(shares).sum(1).mean()).exp().item()


def frechet_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the squared Fréchet distance d² of two sets of vectors, (n, width) and (m, width), in float64."""
    # 1. S = RᵀR, where R is the triangle of the centred vectors' QR decomposition
    one, other = one.double(), other.double()
    triangles = [torch.linalg.qr(x - x.mean(0), mode="r").R / (len(x) - 1) ** 0.5 for x in (one, other)]
    # 2. The eigenvalues of (S₁ S₂)^½ are the singular values of R₁ R₂ᵀ, which rounding cannot make negative
    across = torch.linalg.svdvals(triangles[0] @ triangles[1].T).sum()
    spread = sum(triangle.square().sum() for triangle in triangles)  # tr(S₁ + S₂)
    return ((one.mean(0) - other.mean(0)).square().sum() + spread - 2 * across).item()
