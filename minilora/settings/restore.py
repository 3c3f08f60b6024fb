"""The settings of minilora.apps.restore, declared once."""

from dataclasses import dataclass

from . import shared
from .setting import AT_LEAST_0, AT_LEAST_1, ByBase, Settings, setting
from .shared import LORA, OUTPUT, PICTURES, folder_for


@dataclass(frozen=True)
class RestoreConfig(Settings):
    """Every setting of minilora.apps.restore."""

    usage = "PICTURE --prompt TEXT"
    examples = (
        "python -m minilora.apps.restore photo.png --prompt 'red apple'",
        "python -m minilora.apps.restore photo.png --prompt 'red apple' \\\n      --edit 'green apple' --strength 0.5",
    )

    picture: tuple[str, ...] = setting(
        (), "picture to restore", group=PICTURES, metavar="PICTURE", basic=True, bare=True
    )
    prompt: str | None = setting(None, "what it shows", group=PICTURES, basic=True)
    edit: tuple[str, ...] = setting(
        (), "another prompt to draw from the picture's noise; may be repeated", repeat=True, group=PICTURES, basic=True
    )
    strength: float = setting(
        0.4, "strength of the LoRA for --edit", group=PICTURES, metavar="STRENGTH", basic=True, within=AT_LEAST_0
    )
    lora: str | None = setting(
        None, "LoRA of this picture; if not given, one is trained", group=LORA, metavar="LORA", basic=True
    )
    model: str | None = shared.model()
    output: str | None = setting(
        None, "folder of the results; if not given, out/restore-<name>", group=OUTPUT, metavar="FOLDER", basic=True
    )

    guidance: float = setting(
        ByBase(4.0, 1.5),
        "classifier-free guidance of --edit, at least 1; 1 is without",
        group=PICTURES,
        metavar="FACTOR",
        within=AT_LEAST_1,
    )
    steps: int = setting(
        50,
        "DDIM steps from the picture to its noise, and as many back",
        group=PICTURES,
        metavar="STEPS",
        within=AT_LEAST_1,
    )
    rank: int = setting(16, "rank of the LoRA that is trained", group=LORA, metavar="RANK", within=AT_LEAST_1)
    train_steps: int = setting(
        ByBase(500, 400), "optimizer steps that it is trained for", group=LORA, metavar="STEPS", within=AT_LEAST_1
    )
    precision: str = shared.precision()

    @classmethod
    def following(cls, values: dict) -> dict:
        names = values.get("picture", ())
        return super().following(values) | {"output": str(folder_for("restore", names[:1])) if names else None}

    def problems(self) -> list[str]:
        wrong = [] if len(self.picture) == 1 else [f"restore takes one picture, not {len(self.picture)}"]
        if self.prompt is None:
            wrong.append("--prompt is needed: what the picture shows")
        return wrong
