#!/usr/bin/env bash
# Make every picture, figure and curve of README and docs anew, from real runs on the bundled base.
# Needs the extra "docs"; on two cores about an hour and a half, most of it distillation.
set -euo pipefail
cd "$(dirname "$0")/.."
pictures=docs/pictures

# README
torchrun train.py --data dataset/mountain
cp out/mountain/samples/before_after.png $pictures/mountain.png
torchrun train.py --data dataset/cyanotype --recipe style
python sample.py --prompt "apple" --prompt "car" --prompt "penguin" --lora out/cyanotype \
    --strengths 0,0.25,0.5,0.75,1 --output $pictures/cyanotype.png

# docs/restore.md
python -m minilora.apps.restore dataset/mountain/mountain.jpg --prompt "mountain" \
    --edit "volcano" --edit "night" --edit "sunrise over mountains"
cp out/restore-mountain/restored.png $pictures/restore.png
python -m minilora.apps.restore dataset/mountain/mountain.jpg --prompt "mountain" --edit "volcano" --edit "night" \
    --edit "sunrise over mountains" --optimise-text --output out/imagic
cp out/imagic/between.png $pictures/between.png

# docs/morph.md
python -m minilora.apps.morph dataset/mountain/mountain.jpg dataset/mountain_autumn/mountain_autumn.jpg \
    --prompt "mountain" --prompt "mountain in autumn"
cp out/morph-mountain-mountain_autumn/morph.{gif,png} $pictures/

# docs/restyle.md
python sample.py --prompt "heart" --prompt "car" --prompt "penguin" --prompt "dog" --prompt "mushroom" --prompt "house" \
    --prompt "guitar" --prompt "rocket" --prompt "cat" --prompt "tulip" --prompt "apple" --prompt "hamburger" \
    --count 2 --output out/things
python -m minilora.apps.restyle out/things --lora out/cyanotype --strengths 0,0.25,0.5,0.75,1 --strength 0.8 \
    --style dataset/cyanotype
cp out/restyle-things/restyled.png $pictures/restyle.png
python sample.py --prompt "mountain" --lora out/mountain --lora out/cyanotype --grid 0,0.25,0.5,0.75,1 \
    --output $pictures/grid.png

# docs/from_scratch.md
python docs/from_scratch/walk.py dataset/mountain/mountain.jpg --prompt mountain --output $pictures/from_scratch.png

# docs/distill.md
python train.py --data dataset/cyanotype --targets attention --steps 400 --output out/steps_400
python -m minilora.apps.distill
cp out/lcm/lcm.png $pictures/lcm.png
python sample.py --prompt "tomato" --prompt "heart" --prompt "umbrella" --count 4 --lora out/lcm \
    --lora out/steps_400 --scheduler lcm --steps 4 --guidance 1 --output $pictures/lcm_style.png
python -m minilora.apps.distill --objective smooth --data out/lcm/pictures

# docs/your_pictures.md: too few, enough and too many steps
for steps in 25 100; do
    python train.py --data dataset/mountain --steps $steps --output out/steps_$steps
done
python docs/side_by_side.py --prompt "mountain" --prompt "house" --prompt "cat" --lora "25 steps" out/steps_25 \
    --lora "100 steps" out/steps_100 --lora "300 steps" out/mountain --output $pictures/steps.png

# docs/your_pictures.md: masks; the same pictures without them
mkdir -p out/whole_pictures
cp dataset/robot/robot_??.png dataset/robot/metadata.jsonl out/whole_pictures
python train.py --data out/whole_pictures --output out/whole
python train.py --data dataset/robot
python docs/side_by_side.py --prompt "sks robot" --count 4 --lora "whole pictures" out/whole --lora "masks" out/robot \
    --output $pictures/masks.png

# docs/page.md
python docs/screenshots.py

python docs/figures.py
python docs/gallery.py
