"""Train a LoRA:  torchrun train.py --data dataset/mountain   (or python train.py …)."""

from minilora.settings.command_line import train

if __name__ == "__main__":
    train()
