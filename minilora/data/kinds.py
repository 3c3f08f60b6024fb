"""Kinds of pictures that Pillow does not read: how to recognise them, and how to make them readable."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

_NAMES = {
    "HEIC": "heic heics heif heifs hif",
    "AVIF": "avif avifs",
    "JPEG XL": "jxl",
    "JPEG XR": "jxr wdp hdp",
    "camera raw": "3fr arw cr2 cr3 crw dcr dng erf fff gpr iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf "
    "srw x3f",
    "HDR": "exr hdr",
    "SVG": "svg svgz",
    "a drawing program's": "afphoto ai clip kra pdn psb sai xcf",
}
_BY_SUFFIX = {f".{suffix}": kind for kind, suffixes in _NAMES.items() for suffix in suffixes.split()}
# mif1 means any coding, so it comes last: AVIF files have it, too.
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"crx ": "camera raw", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC"}
_READERS = {
    "HEIC": "HEIC needs pillow-heif: pip install -e '.[heic]'",
    "AVIF": "AVIF needs a newer Pillow: pip install -U pillow",
}
_MOST = 20  # names in one message


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name, readable or not."""
    return path.suffix.lower() in Image.registered_extensions() or path.suffix.lower() in _BY_SUFFIX


def unread_kind(path: Path) -> str:
    """Return the kind of an unreadable picture by its name; "" if it can be read.

    The name decides, because a camera's raw file is often a TIFF that begins with a thumbnail, which Pillow would read.
    """
    suffix = path.suffix.lower()
    return "" if suffix in Image.registered_extensions() else _BY_SUFFIX.get(suffix, "")


def kind_of_bytes(content: bytes) -> str:
    """Return the unreadable kind of a file by its first bytes, regardless of its name; "" if it is none.

    Source: ISO/IEC 14496-12, 4.3 (the brands of a `ftyp` box); ISO/IEC 18181-2, for JPEG XL.
    """
    box = content[8 : min(64, int.from_bytes(content[:4]))]
    brands = [box[i : i + 4] for i in range(0, len(box), 4)] if content[4:8] == b"ftyp" else []
    kind = next((kind for brand, kind in _BRANDS.items() if brand in brands), "")
    if content.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        kind = "JPEG XL"
    # A picture of a readable kind that could not be opened is damaged.
    return kind if kind and unread_kind(Path(f"a.{_NAMES[kind].split()[0]}")) else ""


def remedy(kinds: Sequence[str]) -> str:
    """Return advice on how to make pictures of these kinds readable."""
    ways = [way for kind, way in _READERS.items() if kind in kinds]
    if {*kinds} - _READERS.keys():
        others = "others" if ways else "them" if len(kinds) > 1 else "it"
        ways.append(f"save {others} as .png or .jpg, or move {others} out of the folder")
    return "; ".join(ways)


def named(names: Sequence[str], what: str) -> str:
    """Return a single name as it is, several with their number: "2 pictures (a.png, b.png)"."""
    if len(names) == 1:
        return names[0]
    more = f", and {len(names) - _MOST:,} more" if len(names) > _MOST else ""
    return f"{len(names):,} {what} ({', '.join(names[:_MOST])}{more})"
