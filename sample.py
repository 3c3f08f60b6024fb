"""Draw pictures with LoRAs:  python sample.py --prompt "mountain" --lora out/mountain."""

from minilora.settings.command_line import sample

if __name__ == "__main__":
    sample()
