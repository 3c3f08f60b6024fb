#!/usr/bin/env bash
# Make the README's pictures anew, from real runs on the bundled base; about ten minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun train.py --data dataset/mountain
cp out/mountain/samples/before_after.png docs/pictures/mountain.png
torchrun train.py --data dataset/fluent
python sample.py --prompt "tomato" --prompt "smile" --prompt "sunflower" --lora out/fluent \
    --scales 0,0.25,0.5,0.75,1 --output docs/pictures/fluent.png
