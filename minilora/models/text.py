"""Text: from tokens to the U-Net's conditioning, prompts that are too long, text encoders that are trained."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import CLIPTokenizer

from ..diffusion import Conditioning
from ..files.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from ..lora import inject_lora, lora_layers, remove_lora


def encode_tokens(text_encoders: Sequence[nn.Module], tokens: torch.Tensor, sizes=None) -> Conditioning:
    """Return the conditioning of tokens, (batch, encoders, tokens)."""
    if len(text_encoders) == 1:
        return Conditioning(text_encoders[0](tokens[:, 0]).last_hidden_state)
    seen = [encoder(tokens[:, i], output_hidden_states=True) for i, encoder in enumerate(text_encoders)]
    text = torch.cat([one.hidden_states[-2] for one in seen], dim=-1)  # (batch, tokens, width + width)
    return Conditioning(text, seen[-1].text_embeds, sizes)


# ------------------------------------------------------------------------------- prompts that are too long


def cut_off(tokenizers: Sequence[CLIPTokenizer], prompt: str) -> str:
    """Return the end of a prompt that is too long for a text encoder; "" if it fits."""
    ends = [""]
    for tokenizer in tokenizers:
        places = tokenizer(prompt, return_offsets_mapping=True, verbose=False).offset_mapping
        if len(places) > tokenizer.model_max_length:  # the last token is the end token
            ends.append(prompt[places[tokenizer.model_max_length - 1][0] :])
    return max(ends, key=len)


def warn_of_cuts(tokenizers: Sequence[CLIPTokenizer], texts: Iterable[str], what: str) -> None:
    """Print one warning for all texts that are too long for a text encoder, with the words that it ignores."""
    if ends := [end for text in texts if (end := cut_off(tokenizers, text))]:
        shown = ends[0] if len(ends[0]) <= 60 else f"{ends[0][:60]}…"
        these, where = f"a {what} is", ""
        if len(ends) > 1:
            these, where = f"{len(ends)} {what}s are", ", in the first of them"
        warning = f"{these} too long for the text encoder, which ignores the end{where}: “…{shown}”"
        print(f"warning: {warning}", file=sys.stderr)


# ------------------------------------------------------------------------- text encoders that are trained


class Tokens(Conditioning):
    """The conditioning if the text encoders are trained, too: `text` holds tokens, (batch, encoders, tokens)."""

    def inputs(self) -> dict:
        """Return the keyword arguments for UNetWithText."""
        return {"tokens": self.text, "sizes": self.sizes}


class UNetWithText(nn.Module):
    """A U-Net and its text encoders as one network, so that gradients flow from the U-Net into the encoders."""

    def __init__(self, unet: nn.Module, text_encoders: Sequence[nn.Module]):
        super().__init__()
        self.unet = unet
        for name, encoder in zip((TEXT_ENCODER, TEXT_ENCODER_2), text_encoders, strict=False):
            self.add_module(name, encoder)

    def text_encoders(self) -> list[nn.Module]:
        return [child for name, child in self.named_children() if name != UNET]

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor, sizes=None):
        conditioning = encode_tokens(self.text_encoders(), tokens, sizes)
        return self.unet(x, timesteps, **conditioning.inputs())

    def inject(self, *args, **kwargs) -> None:
        """Call `inject_lora` on each text encoder."""
        encoders = self.text_encoders()
        for encoder in encoders:
            inject_lora(encoder, *args, **kwargs)
        if len(encoders) > 1:
            # XL's U-Net gets the output of the first encoder's last layer but one, so the last layer has no gradient.
            config: Any = encoders[0].config
            last = f"layers.{config.num_hidden_layers - 1}"
            [behind] = [child for path, child in encoders[0].named_modules() if path.endswith(last)]
            if lora_layers(behind):
                remove_lora(behind)
