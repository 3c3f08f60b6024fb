"""The names of what the bundled base knows, which are all that is needed to distil it.

    python -m minilora.base.captions --data base-data

writes minilora/base/captions.txt: one thing a line, by the first of its names.
"""

import argparse
from pathlib import Path

from minilora.files import write_whole
from minilora.models import BUNDLED

from .pictures import read_things


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minilora.base.captions", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("base-data"), help="folder of the unpacked data packages")
    path = BUNDLED / "captions.txt"
    names = dict.fromkeys(names[0] for _, names, _ in read_things(parser.parse_args().data))
    write_whole(path, "".join(f"{name}\n" for name in names).encode())
    print(f"wrote {len(names)} names to {path}")


if __name__ == "__main__":
    main()
