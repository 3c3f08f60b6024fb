"""The style that LoRA is shown to learn: Fluent 3D, which the bundled base has never seen.

    python -m minilora.base.fluent --data base-data

writes dataset/fluent/: 64 pictures to learn from.  All the others stay out, to measure with.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from .pictures import fluent_pictures

LICENSE = """\
The pictures are from Microsoft's Fluent Emoji (3D), Copyright (c) Microsoft Corporation, MIT licence,
as packed by LobeHub in `@lobehub/fluent-emoji-3d` 1.1.0, and resized to 128 pixels.  Captions are the names in
`emoji-datasource` 16.0.0, Copyright (c) 2013 Cal Henderson, MIT licence.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense,
and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so,
subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN
NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY,
WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE
SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minilora.base.fluent", description="Write dataset/fluent.")
    parser.add_argument("--data", type=Path, default=Path("base-data"), help="folder of the unpacked data packages")
    parser.add_argument("--output", type=Path, default=Path("dataset/fluent"), help="folder to write")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for path, names in sorted(fluent_pictures(args.data)[0], key=lambda pair: pair[1]):
        file_name = names[0].replace(" ", "_") + ".png"
        with Image.open(path) as picture:
            small = picture.convert("RGBA").resize((128, 128), Image.Resampling.LANCZOS)
        small.save(args.output / file_name, optimize=True)
        rows.append(json.dumps({"file_name": file_name, "text": list(names)}))
    (args.output / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    (args.output / "LICENSE.md").write_text(LICENSE)
    print(f"wrote {len(rows)} pictures to {args.output}")


if __name__ == "__main__":
    main()
