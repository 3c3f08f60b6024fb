"""The settings of minilora.apps.evaluate."""

from dataclasses import dataclass

from . import shared
from .base import BaseSettings
from .shared import of_data, of_model, of_output


@dataclass(frozen=True)
class EvaluateConfig(BaseSettings):
    """Every setting of minilora.apps.evaluate."""

    usage = "[PICTURES REFERENCE]"
    examples = (
        "python -m minilora.apps.evaluate out/pictures dataset/fluent",
        "python -m minilora.apps.evaluate out/pictures dataset/fluent --lora out/fluent",
        "python -m minilora.apps.evaluate --drift --lora out/fluent",
    )

    folders: tuple[str, ...] = of_data(
        (),
        "a folder of drawn pictures and a folder of real pictures with captions",
        "PICTURES REFERENCE",
        basic=True,
        bare=True,
    )
    lora: tuple[str, ...] = of_model(
        (),
        "LoRA to measure; with a strength: out/fluent:0.8; may be repeated",
        "LORA[:STRENGTH]",
        repeat=True,
        basic=True,
    )
    model: str | None = shared.model_of_lora()
    output: str = of_output("out/evaluate", "folder for the figures and the sheets of pictures", "FOLDER", basic=True)

    caption: str | None = of_data(None, "caption for pictures of REFERENCE that have none")
    drift: bool = of_data(
        False,
        "measure how far the LoRA moves pictures of other things, drawn without and with it; PICTURES and REFERENCE "
        "may then be left out",
        needs=("lora", "whose drift is measured"),
    )
    features: str | None = of_data(
        None,
        "vision model (folder or hub id) for the distances that publications report: facebook/dinov2-base, "
        "openai/clip-vit-base-patch32",
        "MODEL",
    )
    classifier: str | None = of_data(
        None, "image classifier (folder or hub id) for the Inception Score: google/vit-base-patch16-224", "MODEL"
    )
    precision: str = shared.precision()

    def problems(self, given: set[str]) -> list[str]:
        if len(self.folders) != 2 and (self.folders or not self.drift):
            return [f"evaluate takes two folders, PICTURES REFERENCE, not {' '.join(self.folders) or 'nothing'}"]
        return []
