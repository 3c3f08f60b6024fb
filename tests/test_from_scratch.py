"""The U-Net of docs/from_scratch is that of diffusers for each family, and takes a LoRA by the same names."""

import sys

import pytest
import torch
from conftest import make_unet
from diffusers import UNet2DConditionModel
from helpers import ROOT, randomize

from minilora import inject_lora, merge_lora
from minilora.files.network import load_lora_state_dict, lora_state_dict
from minilora.settings.setting import BUNDLED

sys.path.insert(0, str(ROOT / "docs" / "from_scratch"))
sys.path.insert(0, str(ROOT / "benchmarks"))
from scaling import BASES
from unet import UNet

FAMILIES = ("sd1", "sd2", "sdxl")


def inputs(config: dict, family: str) -> tuple[list[torch.Tensor], dict]:
    """Return inputs for both networks: ours, and what diffusers calls those of XL."""
    torch.manual_seed(0)
    x, text = torch.randn(2, config["in_channels"], 16, 16), torch.randn(2, 7, config["cross_attention_dim"])
    first = [x, torch.tensor([3, 801]), text]
    if family != "sdxl":
        return first, {}
    width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    pooled, sizes = torch.randn(2, width), torch.tensor([[64.0, 48.0, 0.0, 8.0, 64.0, 64.0]]).repeat(2, 1)
    return [*first, pooled, sizes], {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


def twins(family: str) -> tuple[UNet, UNet2DConditionModel]:
    theirs = make_unet(family)
    ours = UNet(dict(theirs.config))
    ours.load_state_dict(theirs.state_dict())  # strict: no name more, none less
    return ours, theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_it_predicts_what_diffusers_predicts(family):
    ours, theirs = twins(family)
    given, more = inputs(dict(theirs.config), family)
    # float32's rounding of sums that are computed in another order.
    torch.testing.assert_close(ours(*given), theirs(*given[:3], **more).sample, rtol=1e-5, atol=1e-5)


def test_it_has_the_modules_of_the_real_topologies():
    """At full size, as shapes without numbers: Stable Diffusion 1.5 and XL."""
    for shape in BASES.values():
        with torch.device("meta"):
            theirs = UNet2DConditionModel(**shape)
            ours = UNet(dict(theirs.config))
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }


def test_it_loads_the_bundled_base():
    ours, theirs = UNet.load(BUNDLED / "unet"), UNet2DConditionModel.from_pretrained(BUNDLED, subfolder="unet")
    given, _ = inputs(dict(theirs.config), "sd1")
    with torch.no_grad():
        torch.testing.assert_close(ours(*given), theirs(*given).sample, rtol=1e-5, atol=1e-5)  # as above


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_goes_into_the_same_layers_trains_and_merges(family):
    ours, theirs = twins(family)
    for unet in (ours, theirs):
        inject_lora(unet, rank=2)
    randomize(theirs)
    load_lora_state_dict(ours, lora_state_dict(theirs))  # an error if a layer were called otherwise
    given, more = inputs(dict(theirs.config), family)
    predictions = [ours(*given), theirs(*given[:3], **more).sample]
    for prediction in predictions:
        prediction.square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    found = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    # Sums of float32 in another order, through the whole network.
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    merge_lora(ours)
    torch.testing.assert_close(ours(*given), predictions[0], rtol=1e-4, atol=1e-5)  # ΔW x is rounded otherwise
