"""The command lines of the scripts in this folder, and the data packages that they read."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from .pictures import STYLES

DATA_HELP = """\
The build reads these packages, unpacked side by side in --data:
  noto              npm pack @iconify-json/noto@1.2.9            Noto Emoji, Apache-2.0
  twemoji           npm pack @iconify-json/twemoji@1.2.5         Twemoji, CC-BY-4.0
  openmoji          npm pack @iconify-json/openmoji@1.2.29       OpenMoji, CC-BY-SA-4.0
  fluent-emoji-3d   npm pack @lobehub/fluent-emoji-3d@1.1.0      Fluent 3D, MIT (to measure only)
  lomiri            apt-get download lomiri-wallpapers-16.04 lomiri-wallpapers-20.04    photographs, CC
for example
  mkdir noto && tar xzf iconify-json-noto-1.2.9.tgz -C noto --strip-components=1
  dpkg-deb -x lomiri-wallpapers-16.04*.deb lomiri && dpkg-deb -x lomiri-wallpapers-20.04*.deb lomiri
and it needs the extra "base": pip install -e ".[base]\""""


def command_line(
    script: str, description: str, folders: Mapping[str, tuple[Path | None, str]]
) -> argparse.ArgumentParser:
    """Return the command line of a script: --data, and other folders, each with its default and its help."""
    parser = argparse.ArgumentParser(
        prog=f"python -m minilora.base.{script}",
        description=description,
        epilog=DATA_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = (Path("base-data"), "folder of the unpacked data packages")
    for name, (default, text) in {"data": data, **folders}.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FOLDER", default=default, help=text)
    return parser


def refuse_missing(data: Path, *more: str) -> None:
    """End the program, with what to download, if a data folder lacks the drawings or `more`."""
    needed = [*(f"{style}/icons.json" for style in STYLES), *more]
    if missing := [name for name in needed if not (data / name).exists()]:
        print(f"error: {data} lacks {', '.join(missing)}\n\n{DATA_HELP}", file=sys.stderr)
        sys.exit(2)
