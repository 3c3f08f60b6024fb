"""A base on disk: its files, and where they hold the weight of each module.

There are two layouts: a diffusers folder, with a sub-folder for each component, and the single file in which Stable
Diffusion was published ("original").  The folder of a motion adapter (AnimateDiff's) is a part of a U-Net.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..settings.errors import UserError
from ..settings.strict_json import parse_json
from .from_hub import base_path, variant_of
from .names import COMPONENTS, UNET, diffusers_unet_paths, full_name, modules_of_original
from .number_types import DTYPES, WEIGHTS, widen
from .tensors import PICKLES, Entry, TensorFile, write_whole


@dataclass(frozen=True)
class Place:
    """Where a module's weight is: the rows from `first_row` on of a tensor in one of a checkpoint's files."""

    file: Path  # relative to the checkpoint
    key: str
    first_row: int
    shape: tuple[int, ...]  # of the module's weight
    transposed: bool = False  # (in, out) in the file


class Checkpoint:
    """A base on disk: its weight files, all its other files, and the place of each module's weight.

    `revision` belongs to a hub id.  If `variant` is given, only a folder's weights of that variant are used.
    Raises UserError if there is no Stable Diffusion in safetensors files at `path`.
    """

    def __init__(self, path: Path, revision: str | None = None, variant: str | None = None):
        self.path = path = base_path(path, revision, variant)
        self.variant = variant
        self.files: dict[Path, TensorFile] = {}  # by path relative to `path`
        self.others: list[Path] = []
        self.left_out: list[Path] = []  # weights in other formats, which merging cannot change
        self.places: dict[str, list[Place]] = {}
        if path.is_dir():
            self._look_through_folder()
        elif path.is_file() and not variant:
            self.files[Path()] = TensorFile(path)
            self._find_original_places()
        else:
            what = f"folder, which the variant {variant} needs" if variant else "file or folder"
            raise UserError(f"{path}: there is no such {what}")
        if not self.places:
            raise UserError(
                f"{path}: it has no .safetensors weights of the variant {variant}"
                if variant
                else f"{path}: it is neither a diffusers folder with .safetensors weights nor a single file of one"
            )

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values()) + sum((self.path / p).stat().st_size for p in self.others)

    @property
    def content(self) -> set[Path]:
        """The files of a folder of this layout; empty for a single file."""
        return {*self.files, *self.others} if self.path.is_dir() else set()

    @property
    def modules(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights, by the modules' full names."""
        return {name: places[0].shape for name, places in self.places.items()}

    def weight(self, name: str) -> np.ndarray:
        """Return the weight of a module, in float32, or in float64 if it is stored in float64."""
        place = self._place_of(name)
        stored = self.files[place.file].read(place.key)
        return widen(stored.T if place.transposed else stored[place.first_row : place.first_row + place.shape[0]])

    def type_of(self, name: str) -> str:
        """Return the stored type of a module's weight, under safetensors' name."""
        return self._stored_type(self._place_of(name))

    def _place_of(self, name: str) -> Place:
        """Return the variant of the widest type; of equal ones, not the one named non_ema."""
        return min(self.places[name], key=lambda p: (-DTYPES[self._stored_type(p)].itemsize, "non_ema" in p.file.name))

    def _stored_type(self, place: Place) -> str:
        return self.files[place.file].entries[place.key].dtype

    def copy_others(self, target: Path) -> None:
        """Copy all files that are not weights into another folder."""
        for path in self.others:
            write_whole(target / path, (self.path / path).read_bytes())

    def _look_through_folder(self) -> None:
        depth = 1 if _is_motion_adapter(self.path) else 2
        for path in sorted(p.relative_to(self.path) for p in self.path.rglob("*") if p.is_file()):
            if any(part.startswith(".") or part == "__pycache__" for part in path.parts):
                continue  # a cache or a repository, not the base
            wanted = len(path.parts) == depth and self.variant in (None, "", variant_of(path))
            if path.suffix in (*PICKLES, ".msgpack", ".onnx", ".h5") or (path.suffix == ".safetensors" and not wanted):
                self.left_out.append(path)
            elif path.suffix != ".safetensors":
                self.others.append(path)
            else:
                self.files[path] = TensorFile(self.path / path)
                if (component := UNET if depth == 1 else path.parts[0]) in COMPONENTS:
                    for key, entry in self.files[path].entries.items():
                        self._add([full_name(component, key.removesuffix(".weight"))], path, key, entry)

    def _find_original_places(self) -> None:
        prefix, entries = "model.diffusion_model.", self.files[Path()].entries
        originals = {key: key.removeprefix(prefix).removesuffix(".weight") for key in entries if key.startswith(prefix)}
        paths = diffusers_unet_paths(originals.values())
        for key, entry in entries.items():
            if key not in originals:
                self._add(modules_of_original(key), Path(), key, entry)
            elif path := paths.get(originals[key]):
                self._add([full_name(UNET, path)], Path(), key, entry)

    def _add(self, names: list[str], file: Path, key: str, entry: Entry) -> None:
        """Record that a key holds the stacked weights of some modules."""
        transposed = key.endswith(".text_projection")  # OpenCLIP computes x P with it; a layer computes x Wᵀ
        if not (key.endswith("weight") or transposed) or len(entry.shape) not in (2, 4):
            return
        if entry.dtype not in WEIGHTS or any(".embeddings." in name for name in names):
            return  # embeddings or integers, which cannot have a LoRA
        for number, name in enumerate(names):
            rows = entry.shape[0] // len(names)
            shape = entry.shape[::-1] if transposed else (rows, *entry.shape[1:])
            place = Place(file, key, number * rows, shape, transposed)
            self.places.setdefault(name, []).append(place)


def _is_motion_adapter(folder: Path) -> bool:
    """Whether a folder is that of a motion adapter, by its settings."""
    try:
        config = parse_json((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("_class_name") == "MotionAdapter"
