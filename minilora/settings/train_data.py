"""The settings of the training data: pictures, held-out pictures and class pictures."""

import os
from dataclasses import dataclass
from functools import partial

from .recipes import RECIPES
from .setting import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE, ByBase, Settings, option, setting
from .shared import WEIGHT, of_data, of_training, path_and_number

# These two are for `needs` of `setting`.
CLASS = ("class_prompt", "what the class pictures show")
VARIANTS = ("variants", "how many there are")
VARIED = ("colour_jitter", "shuffle_tags", "tag_dropout")  # besides the crop, what variants differ in

of_source = partial(of_data, in_identity=False)  # the content of the pictures counts, not its source
of_validation = partial(setting, group="validation", in_identity=False)
of_class = partial(setting, group="class pictures (DreamBooth)")


@dataclass(frozen=True)
class DataSettings(Settings):
    """Which pictures and captions are seen, and how."""

    data: tuple[str, ...] = of_source(
        (),
        "folder of pictures with captions (metadata.jsonl, metadata.csv, or a .txt beside each), or one picture, or "
        "hub id of a data set (OWNER/NAME); may be repeated; with a weight, folder:2, each comes twice per epoch",
        "FOLDER",
        repeat=True,
        basic=True,
    )
    caption: str | None = of_source(
        None, "caption for pictures that have none of their own", alias="--instance-prompt", basic=True
    )
    caption_column: str = of_source(
        "text", "name of the caption's column, in metadata.jsonl, metadata.csv or a data set on the hub", "KEY"
    )
    image_column: str = of_source("image", "name of the picture's column, in a data set on the hub", "NAME")
    max_pictures: int | None = of_source(
        None,
        "number of pictures to take from a data set on the hub, the first ones; if not given, all",
        "N",
        AT_LEAST_1,
    )
    data_revision: str | None = of_source(None, "branch, tag or commit of a data set on the hub", "REVISION")
    trigger: str | None = of_data(None, "word to put before every caption: sks makes 'sks, a dog'", "WORD", basic=True)
    recipe: str | None = of_training(
        None,
        "what to learn: sets steps (by the number of pictures), rank, learning rate and more, unless you give them",
        choices=RECIPES,
        basic=True,
        in_identity=False,
    )
    resolution: int | None = of_data(
        None, "side of the training pictures in pixels; if not given, the base's own", "PIXELS", AT_LEAST_1, basic=True
    )
    crop: str = of_data(
        "center",
        "which square of a picture to use; random takes another each time, and encodes it again, without the cache",
        choices=("center", "random"),
    )
    buckets: bool = of_data(
        False,
        "train on several shapes of about equal area instead of squares, so that less is cropped away",
        by_recipe=True,
    )
    mirror: bool = of_data(False, "mirror each picture half of the time", by_recipe=True)
    alpha_mask: bool = of_source(
        False,
        "use each picture's alpha channel as its mask, so that only the opaque part is learnt; a mask file, "
        "name.mask.png, white where the picture counts, needs no setting",
    )
    outside: float = of_data(0.0, "loss weight of what a mask leaves out, 0 to 1", "SHARE", SHARE)
    variants: int | None = of_data(
        None,
        "number of times to encode each picture, with other crops, colours and tags; one of them is drawn each time; "
        "--crop random then needs no VAE in memory",
        "N",
        AT_LEAST_1,
    )
    colour_jitter: float = of_data(
        0.0,
        "largest change of a variant's brightness, contrast and saturation, 0 to 1; 0.1 is slight",
        "SHARE",
        SHARE,
        needs=VARIANTS,
    )
    shuffle_tags: bool = of_data(False, "shuffle the tags of a caption, the parts between commas", needs=VARIANTS)
    tag_dropout: float = of_data(0.0, "share of a caption's tags to leave out, 0 to 1", "SHARE", SHARE, needs=VARIANTS)
    keep_tags: int = of_data(
        0, "number of tags at the beginning that stay in place; --trigger always does", "N", AT_LEAST_0, needs=VARIANTS
    )
    caption_dropout: float = of_data(
        ByBase(0.0, 0.1), "share of examples, 0 to 1, that get an empty caption", "SHARE", SHARE
    )
    max_pixels: int = of_source(
        89_478_485,
        "largest allowed number of pixels in a picture; a small file can claim more than memory holds",
        "PIXELS",
        AT_LEAST_1,
    )
    cache: str = of_source(
        "~/.cache/minilora", "folder for encoded pictures and captions, shared by all runs", "FOLDER"
    )

    validation: str | None = of_validation(
        None,
        "held-out pictures for the validation loss: a folder, or a share of --data such as 0.1; the LoRA with the "
        "lowest loss is saved, too",
        "FOLDER|SHARE",
    )
    validate_every: int | None = of_validation(
        None,
        "steps between two measurements; there is always one at the start and one at the end",
        "STEPS",
        AT_LEAST_1,
        needs=("validation", "the held-out pictures"),
    )

    patience: int | None = of_validation(
        None,
        "end the run after this many measurements in a row without a lower validation loss; the result is the LoRA "
        "with the lowest",
        "MEASUREMENTS",
        AT_LEAST_1,
        needs=("validate_every", "how often the loss is measured"),
    )

    class_prompt: str | None = of_class(None, "prompt of the subject's class, for prior preservation: 'a dog'")
    preserve: float = of_class(
        0.0,
        "prior preservation without class pictures: weight of a loss that keeps the base's predictions at "
        "--class-prompt, else at the captions without --trigger, else at the empty prompt; 1 is common",
        "WEIGHT",
        AT_LEAST_0,
    )
    class_data: str | None = of_class(
        None,
        "folder of class pictures; missing ones are generated; if not given, out/class-<prompt>",
        "FOLDER",
        needs=CLASS,
        in_identity=False,
    )
    class_pictures: int = of_class(
        ByBase(200, 16), "total number of class pictures", "PICTURES", AT_LEAST_1, needs=CLASS, in_identity=False
    )
    prior_weight: float = of_class(1.0, "loss weight of the class pictures", "WEIGHT", ABOVE_0, needs=CLASS)

    @property
    def validation_share(self) -> float | None:
        """The share of --data that --validation holds out; None if it names a folder or was not given."""
        try:
            return float(self.validation) if self.validation and not os.path.exists(self.validation) else None
        except ValueError:
            return None

    @property
    def needs_vae(self) -> bool:
        """Whether each example is encoded anew, so that the VAE must stay in memory."""
        return self.crop == "random" and not self.variants

    @property
    def has_class_pictures(self) -> bool:
        """Whether every other training picture is a class picture; --preserve needs none."""
        return bool(self.class_prompt) and not self.preserve

    def problems(self, given: set[str]) -> list[str]:
        wrong = super().problems(given)
        wrong += [] if self.data else ["--data is needed: a folder of pictures, for example dataset/mountain"]
        wrong += [
            f"--data {path}: the weight {weight:g} is not a whole number of at least 1"
            for path, weight in (path_and_number(text, WEIGHT) for text in self.data)
            if weight < 1 or weight % 1
        ]
        share = self.validation_share
        if share is not None and not 0 < share < 1:
            wrong.append(f"--validation {self.validation}: there is no such folder, and a share is between 0 and 1")
        if self.preserve:
            why = "has no effect with --preserve, which needs no class pictures"
            names = ("class_data", "class_pictures", "prior_weight")
            wrong += [f"{option(name)} {why}" for name in names if name in given]
        if self.variants and not (self.crop == "random" or any(getattr(self, name) for name in VARIED)):
            wrong.append(f"--variants has no effect without --crop random or one of {', '.join(map(option, VARIED))}")
        if self.keep_tags and not (self.shuffle_tags or self.tag_dropout):
            wrong.append("--keep-tags has no effect without --shuffle-tags or --tag-dropout")
        if self.has_class_pictures and self.buckets:
            wrong.append("--class-prompt and --buckets cannot be combined: a batch holds both kinds, in one size")
        if self.has_class_pictures and self.class_data is None:
            wrong.append(f"--class-prompt {self.class_prompt!r} has no word to name a folder after; give --class-data")
        return wrong
