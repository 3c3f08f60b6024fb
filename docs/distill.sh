#!/usr/bin/env bash
# Make the pictures and the figures of distill.md anew, from real runs on the bundled base.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m minilora.apps.distill
cp out/lcm/lcm.png docs/pictures/lcm.png
python train.py --data dataset/fluent
python sample.py --prompt "tomato" --prompt "smile" --prompt "sunflower" --count 4 --lora out/lcm --lora out/fluent:0.8 \
    --scheduler lcm --steps 4 --guidance 1 --output docs/pictures/lcm_fluent.png
python -m minilora.apps.distill --objective smooth --data out/lcm/pictures
cp out/smooth/smooth.png docs/pictures/smooth.png
python docs/figures.py docs/distill.md lcm=out/lcm/figures.json smooth=out/smooth/figures.json
