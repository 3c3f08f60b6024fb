"""files/read.py: any dialect -> ours -> any dialect leaves every ΔW as it was; diffusers and PEFT agree."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import make_tiny_text_encoder, make_unet
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers import random_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from minilora.files.for_base import read_for
from minilora.files.names import full_name, kohya_names, original_unet_paths
from minilora.files.network import components, live_modules
from minilora.files.number_types import EPSILON
from minilora.files.read import FILE_NAME, Delta, FormatError, LoRA, read_lora
from minilora.files.tensors import TensorFile, tensor_bytes
from minilora.files.write import DIALECTS, as_kohya, difference, write_lora
from minilora.settings.errors import UserError
from minilora.settings.setting import BUNDLED

FAMILIES = ("sd1", "sd2", "sdxl")


def modules_of(family: str) -> dict[str, tuple[int, ...]]:
    """Return the modules of a small base of a family, with its text encoders."""
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED, subfolder="tokenizer")
    kinds = [CLIPTextModel, CLIPTextModelWithProjection][: 2 if family == "sdxl" else 1]
    parts = [make_unet(family), *(make_tiny_text_encoder(tokenizer, kind) for kind in kinds)]
    return {name: shape for part in parts for name, shape in live_modules(part).items()}


MODULES = {family: modules_of(family) for family in FAMILIES}


def in_torch(delta: Delta) -> torch.Tensor:
    return torch.from_numpy(delta.matrix())


def path_for(folder, dialect: str):
    return folder / ("adapter" if dialect == "peft" else f"{dialect}.safetensors")


# --------------------------------------------------------------------------------- there and back


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    through=st.lists(st.sampled_from(DIALECTS), min_size=1, max_size=3),
    stored=st.sampled_from(["F32", "F16", "BF16"]),
    seed=st.integers(0, 10_000),
)
def test_through_any_dialects_every_change_stays(family, through, stored, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialects")
    lora = now = random_lora(MODULES[family], seed, share=0.1, stored=stored)
    if not lora.deltas:
        return
    for step, dialect in enumerate(through):
        path = path_for(folder, f"{dialect}") if dialect == "peft" else folder / f"{step}.safetensors"
        write_lora(path, now, dialect, MODULES[family])
        now = read_lora(path, MODULES[family])
        assert not now.unmatched
    # The scale is folded into B once, which rounds it once; after that nothing changes any more.
    assert difference(lora, now) <= 1
    for name, delta in lora.deltas.items():
        np.testing.assert_allclose(
            now.deltas[name].matrix(), delta.matrix(), rtol=0, atol=EPSILON[stored] * 30
        )  # sums of five products of normal numbers, below 30


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_same_lora_gives_the_same_bytes_and_no_other_file_is_left(dialect, tmp_path):
    lora = random_lora(MODULES["sdxl"], 3)
    contents = []
    for name in ("one", "two"):
        path = path_for(tmp_path / name, dialect)
        write_lora(path, lora, dialect, MODULES["sdxl"])
        contents.append({p.relative_to(path): p.read_bytes() for p in [path, *path.rglob("*")] if p.is_file()})
        assert [p.name for p in (tmp_path / name).iterdir()] == [path.name]
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in b"".join(contents[0].values())


# -------------------------------------------------------------------------------- what others write


def test_kohya_files_have_an_alpha_for_each_module(tmp_path):
    lora = random_lora(MODULES["sdxl"], 1)
    names, tensors = kohya_names(MODULES["sdxl"]), {}
    for name, delta in lora.deltas.items():
        a, b = torch.from_numpy(delta.A), torch.from_numpy(delta.B)
        tensors[f"{names[name]}.lora_down.weight"] = a
        tensors[f"{names[name]}.lora_up.weight"] = b[..., None, None] if a.ndim == 4 else b
        tensors[f"{names[name]}.alpha"] = torch.tensor(delta.scale * delta.rank)
    save_file(tensors, tmp_path / "k.safetensors")
    assert difference(lora, read_lora(tmp_path / "k.safetensors", MODULES["sdxl"])) < 1  # alpha is float32, too


@pytest.mark.parametrize("prefix", ["lora_te_text_model_", "lora_te1_text_model_", "lora_te_"])
def test_a_text_encoder_goes_by_several_names(prefix, tmp_path):
    name = f"{prefix}encoder_layers_1_self_attn_q_proj"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)},
        tmp_path / "k.safetensors",
    )
    [found] = read_lora(tmp_path / "k.safetensors", MODULES["sd1"]).deltas
    assert found == "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "down", "up"),
    [
        ("unet.{}", ".lora.down.weight", ".lora.up.weight"),
        ("unet.{}", ".lora_A.weight", ".lora_B.weight"),
        ("unet.{}", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        ("{}", ".lora_A.weight", ".lora_B.weight"),
        ("base_model.model.{}", ".lora_A.default.weight", ".lora_B.default.weight"),
        ("unet.base_model.model.{}", ".lora_A.weight", ".lora_B.weight"),
        ("processor", "_lora.down.weight", "_lora.up.weight"),
        ("unet.processor", "_lora.down.weight", "_lora.up.weight"),
    ],
)
def test_every_spelling_of_diffusers_is_read(name, down, up, tmp_path):
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    name = name.replace("processor", path.replace("to_out.0", "processor.to_out")).format(path)
    save_file({name + down: torch.ones(2, 8), name + up: torch.ones(8, 2)}, tmp_path / "d.safetensors")
    [found] = read_lora(tmp_path / "d.safetensors", MODULES["sd1"]).deltas
    assert found == f"unet.{path}"


def original(name: str, family: str) -> str:
    path = name.removeprefix("unet.")
    return original_unet_paths(n.removeprefix("unet.") for n in MODULES[family] if n.startswith("unet."))[path]


WRITERS = {  # how each calls the modules, and the endings that it writes
    "ComfyUI": (
        lambda name, family: f"diffusion_model.{original(name, family)}",
        {"text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": "text_encoders.clip_g.transformer."},
        ("lora_up", "lora_down"),
    ),
    "ComfyUI of Stable Diffusion 2": (
        lambda name, family: f"diffusion_model.{original(name, family)}",
        {"text_encoder": "text_encoders.clip_h.transformer."},
        ("lora_B", "lora_A"),
    ),
    "bare": (original, {}, ("lora_B", "lora_A")),
    "OneTrainer": (lambda name, family: f"unet.{original(name, family)}", {}, ("lora_up", "lora_down")),
    "LyCORIS": (lambda name, family: f"lycoris_{name[5:].replace('.', '_')}", {}, ("lora_up", "lora_down")),
    "LyCORIS of original names": (
        lambda name, family: f"lycoris_{original(name, family).replace('.', '_')}",
        {},
        ("lora_up", "lora_down"),
    ),
}


@pytest.mark.parametrize(
    ("writer", "family"),
    [(w, f) for w in WRITERS for f in FAMILIES if f == "sd2" or w != "ComfyUI of Stable Diffusion 2"],
)
def test_names_of_other_programs_are_read(writer, family, tmp_path):
    unet_name, encoders, (up, down) = WRITERS[writer]
    if family == "sd2" and writer == "ComfyUI":
        encoders = {}
    lora = random_lora(MODULES[family], 7)
    lora.deltas = {n: c for n, c in lora.deltas.items() if n.split(".")[0] in ("unet", *encoders)}
    tensors = {}
    for name, delta in lora.deltas.items():
        component, path = name.split(".", 1)
        called = unet_name(name, family) if component == "unet" else f"{encoders[component]}{path}"
        b = torch.from_numpy(delta.B)
        tensors[f"{called}.{down}.weight"] = torch.from_numpy(delta.A)
        tensors[f"{called}.{up}.weight"] = b[..., None, None] if delta.A.ndim == 4 else b
        tensors[f"{called}.alpha"] = torch.tensor(delta.scale * delta.rank)
    save_file(tensors, tmp_path / "o.safetensors")
    # Dots tell enough without a base.
    for modules in (MODULES[family], None)[: 1 if writer.startswith("LyCORIS") else 2]:
        found = read_lora(tmp_path / "o.safetensors", modules)
        assert not found.unmatched
        assert difference(lora, found) < 1  # alpha is float32, too


@pytest.mark.parametrize(
    "name", ["input_blocks.2.0.op", "diffusion_model.middle_block.3.proj_in", "text_encoders.clip_x.transformer.a.b"]
)
def test_a_dotted_name_that_no_usual_base_has_is_unmatched(name, tmp_path):
    keys = {f"{name}.{end}.weight": torch.ones(2, 2) for end in ("lora_A", "lora_B")}
    save_file(keys, tmp_path / "o.safetensors")
    assert set(read_lora(tmp_path / "o.safetensors").unmatched) == set(keys)


@pytest.mark.parametrize("modules", [MODULES["sd1"], None], ids=["with a base", "without"])
@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("unet.double_blocks.0.img_attn.qkv", "Flux"),  # OneTrainer
        ("lycoris_single_transformer_blocks_3_attn_to_q", "Flux"),
        ("diffusion_model.joint_blocks.7.x_block.attn.qkv", "Stable Diffusion 3"),
        ("lora_transformer_pos_embed_proj", "a diffusion transformer"),
        ("base_model.model.blocks.0.self_attn.q", "a diffusion transformer"),  # Wan
        ("diffusion_model.layers.0.attention.qkv", "a diffusion transformer"),  # Lumina
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", "a text encoder of Stable"),
    ],
)
def test_a_lora_of_another_network_is_named_as_one(name, network, modules, tmp_path):
    keys = {f"{name}.{end}.weight": torch.ones(2, 2) for end in ("lora_A", "lora_B")}
    save_file(keys, tmp_path / "o.safetensors")
    with pytest.raises(UserError, match=f"is one of {network}"):
        read_for(tmp_path / "o.safetensors", modules, "it", allow_unmatched=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_save_lora_adapter_of_diffusers_writes_is_read(family, tmp_path):
    unet = make_unet(family)
    patterns = {"rank_pattern": {"attn2.to_k": 3}, "alpha_pattern": {"attn2.to_k": 12}}
    unet.add_adapter(
        LoraConfig(r=2, lora_alpha=6, target_modules=["to_k", "conv2"], init_lora_weights=False, **patterns)
    )
    unet.save_lora_adapter(tmp_path / "a")
    theirs = {n: m.get_delta_weight("default") for n, m in unet.named_modules() if hasattr(m, "get_delta_weight")}
    for modules in (MODULES[family], None):  # only a U-Net has such names
        lora = read_lora(tmp_path / "a", modules)
        assert lora.deltas.keys() == {f"unet.{name}" for name in theirs}
        for name, delta in theirs.items():
            torch.testing.assert_close(in_torch(lora.deltas[f"unet.{name}"]), delta)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "renamed.safetensors"])
def test_the_scale_of_a_peft_file_that_is_named_itself_stands_beside_it(name, tmp_path):
    lora = random_lora({n: s for n, s in MODULES["sd1"].items() if n.startswith("text_encoder.")}, 3)
    write_lora(tmp_path / "l", lora, "peft", MODULES["sd1"])
    folder = tmp_path / "l" / "text_encoder"
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"use_rslora": True, "alpha_pattern": {}, "lora_alpha": 5})
    )
    by_folder = read_lora(folder, MODULES["sd1"])
    (folder / "adapter_model.safetensors").rename(folder / name)
    by_file = read_lora(folder / name, MODULES["sd1"])
    assert by_file.deltas.keys() == lora.deltas.keys()
    for name, delta in by_folder.deltas.items():
        assert by_file.deltas[name].scale == delta.scale == 5 / np.sqrt(lora.deltas[name].rank)
    if name == "adapter_model.safetensors":
        (folder / "adapter_config.json").unlink()
        with pytest.raises(FormatError, match=r"its scale is in adapter_config\.json, which is missing beside it"):
            read_lora(folder / name, MODULES["sd1"])


def test_old_text_encoder_files_of_diffusers_are_read(tmp_path):
    name = "text_encoder.text_model.encoder.layers.0.self_attn.to_{}_lora"
    tensors = {
        f"{name.format(n)}.{end}.weight": torch.ones(2, 16).view(shape)
        for n in ("q", "out")
        for end, shape in (("down", (2, 16)), ("up", (16, 2)))
    }
    save_file(tensors, tmp_path / "t.safetensors")
    wanted = {f"text_encoder.text_model.encoder.layers.0.self_attn.{n}_proj" for n in ("q", "out")}
    assert read_lora(tmp_path / "t.safetensors", MODULES["sd1"]).deltas.keys() == wanted
    assert read_lora(tmp_path / "t.safetensors").deltas.keys() == wanted


def test_a_single_file_of_stable_diffusion_2_has_a_layer_more_than_is_counted(tmp_path):
    layer = "text_encoder.text_model.encoder.layers."
    more = {n.replace(f"{layer}1.", f"{layer}2."): s for n, s in MODULES["sd2"].items() if n.startswith(f"{layer}1.")}
    names = [f"{layer}{n}.self_attn.{leaf}_proj" for n in (0, 1) for leaf in ("k", "v", "q", "out")]
    tensors, wanted = {}, {}
    for number, name in enumerate(names):
        a, b = torch.randn(2, 16), torch.randn(16, 2)
        tensors |= {f"text_encoder:{number}:down": a, f"text_encoder:{number}:up": b}
        wanted[name] = Delta(a.numpy(), b.numpy())
    save_file(tensors, tmp_path / "c.safetensors", {"text_encoder": '["CLIPAttention"]'})
    for modules in (MODULES["sd2"], MODULES["sd2"] | more):
        assert difference(LoRA(wanted), read_lora(tmp_path / "c.safetensors", modules)) < 1e-6


@pytest.mark.parametrize("old", [False, True])
def test_counted_modules_of_a_text_encoder_and_of_older_diffusers(old, tmp_path):
    # Within a block: attn1, attn2, ff; in diffusers before 0.12: attn1, ff, attn2. In CLIP: k, v, q, out.
    attention = [f"attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
    block = [*attention[:4], "ff.net.0.proj", *attention[4:]] if old else [*attention, "ff.net.0.proj"]
    unet, encoder = (
        make_unet("sd1"),
        [f"encoder.layers.{n}.self_attn.{leaf}_proj" for n in (0, 1) for leaf in ("k", "v", "q", "out")],
    )
    owners = [path for path, m in unet.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    order = {"unet": [f"unet.{owner}.{leaf}" for owner in owners for leaf in block]}
    order["text_encoder"] = [f"text_encoder.text_model.{path}" for path in encoder]
    tensors, wanted = {"<cat>": torch.zeros(16)}, {}
    for component, paths in order.items():
        for number, name in enumerate(paths):
            out, inputs = MODULES["sd1"][name]
            a, b = torch.randn(2, inputs), torch.randn(out, 2)
            tensors[f"{component}:{number}:down"], tensors[f"{component}:{number}:up"] = a, b
            wanted[name] = Delta(a.numpy(), b.numpy())
    about = {"unet": '["CrossAttention", "GEGLU"]', "text_encoder": '["CLIPAttention"]', "<cat>": "<embed>"}
    save_file(tensors, tmp_path / "c.safetensors", about)
    lora = read_lora(tmp_path / "c.safetensors", MODULES["sd1"])
    assert difference(LoRA(wanted), lora) < 1e-6
    assert lora.unmatched == list(lora.words) == ["<cat>"]
    only_unet = {n: s for n, s in MODULES["sd1"].items() if n.startswith("unet.")}
    assert len(read_lora(tmp_path / "c.safetensors", only_unet).unmatched) == 1 + 2 * len(encoder)


def test_float8_and_small_scales_survive(tmp_path):
    a, b = torch.randn(4, 8), 1e-5 * torch.randn(8, 4)
    save_file(
        {f"{TO_Q}.lora_A.weight": a.to(torch.float8_e4m3fn), f"{TO_Q}.lora_B.weight": b}, tmp_path / "x.safetensors"
    )
    assert read_lora(tmp_path / "x.safetensors", MODULES["sd1"]).deltas[TO_Q].stored == ("F32", "F32")
    a, b = (matrix.half().float().numpy() for matrix in (a, b))
    lora = LoRA({TO_Q: Delta(a, b, 1 / 128, ("F16", "F16"))})  # B / 128 is below what fp16 holds well
    write_lora(tmp_path / "y.safetensors", lora, "diffusers", MODULES["sd1"])
    assert difference(lora, read_lora(tmp_path / "y.safetensors", MODULES["sd1"])) < 1


def test_modules_that_are_only_counted_are_found_by_their_order(tmp_path):
    # As cloneofsimo's trainer walks: the linear layers below modules of some classes, in a model's order.
    unet = make_unet("sd1")
    paths = {child: path for path, child in unet.named_modules()}
    owners = [m for m in unet.modules() if type(m).__name__ in ("Attention", "GEGLU")]
    linears = [child for m in owners for child in m.modules() if isinstance(child, torch.nn.Linear)]
    tensors, wanted = {}, {}
    for number, linear in enumerate(linears):
        a, b = torch.randn(2, linear.in_features), torch.randn(linear.out_features, 2)
        tensors[f"unet:{number}:down"], tensors[f"unet:{number}:up"] = a, b
        wanted[f"unet.{paths[linear]}"] = Delta(a.numpy(), b.numpy())
    save_file(tensors, tmp_path / "c.safetensors", {"unet": '["CrossAttention", "Attention", "GEGLU"]'})
    assert difference(LoRA(wanted), read_lora(tmp_path / "c.safetensors", MODULES["sd1"])) < 1e-6


def test_the_scale_in_diffusers_metadata_counts(tmp_path):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn{}.to_q"
    tensors = {
        f"{name.format(n)}.lora_{m}.weight": torch.ones(2, 8) if m == "A" else torch.ones(8, 2)
        for n in (1, 2)
        for m in "AB"
    }
    config = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {name.format(2).removeprefix("unet."): 1}}
    save_file(tensors, tmp_path / "m.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    lora = read_lora(tmp_path / "m.safetensors", MODULES["sd1"])
    assert [lora.deltas[name.format(n)].scale for n in (1, 2)] == [4, 0.5]
    save_file(tensors, tmp_path / "m.safetensors", {"lora_adapter_metadata": '{"text_encoder.r": 2}'})
    with pytest.raises(FormatError, match="lora_adapter_metadata lacks unet"):
        read_lora(tmp_path / "m.safetensors", MODULES["sd1"])


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_that_peft_wrote_is_read_with_its_patterns(rslora, tmp_path):
    unet = make_unet("sd1")
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "conv1", "proj_in"],
        rank_pattern={"attn2.to_q": 4, "conv1": 3},
        alpha_pattern={"attn2.to_q": 1, r"down_blocks\.0\..*\.to_out\.0": 5},
        init_lora_weights=False,
        use_rslora=rslora,
    )
    model = get_peft_model(unet, config)
    model.save_pretrained(tmp_path / "unet")
    lora = read_lora(tmp_path, MODULES["sd1"])
    theirs = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert {f"unet.{name}" for name in theirs} == lora.deltas.keys()
    for name, layer in theirs.items():
        torch.testing.assert_close(in_torch(lora.deltas[f"unet.{name}"]), layer.get_delta_weight("default"))
    assert difference(lora, read_lora(tmp_path / "unet", MODULES["sd1"])) < 1e-6


# --------------------------------------------------------------------------------- what others read


@pytest.fixture(scope="module", params=FAMILIES)
def pipeline(request):
    """A small pipeline of each family, whose parts only have to take a LoRA."""
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED, subfolder="tokenizer")
    parts = {"vae": None, "tokenizer": tokenizer, "scheduler": None, "feature_extractor": None}
    parts |= {"unet": make_unet(request.param), "text_encoder": make_tiny_text_encoder(tokenizer)}
    if request.param == "sdxl":
        second = make_tiny_text_encoder(tokenizer, CLIPTextModelWithProjection)
        del parts["feature_extractor"]
        result = StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, text_encoder_2=second)
    else:
        result = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    result.family = request.param
    return result


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_diffusers_reads_every_change(dialect, tmp_path, pipeline):
    modules = {n: s for n, s in MODULES[pipeline.family].items() if "text_projection" not in n}
    if dialect == "kohya":
        # What diffusers does not read: modules outside of blocks and, under their original names, all
        # but attention.
        outside = ("time_emb", "conv_in", "conv_out", "add_embedding")
        modules = {n: s for n, s in modules.items() if not any(word in n for word in outside)}
        if pipeline.family == "sdxl":
            modules = {n: s for n, s in modules.items() if not n.startswith("unet.") or ".attentions." in n}
    lora = LoRA({})
    for component, ranks in (("unet.", (1, 6)), ("text_encoder.", (2, 9)), ("text_encoder_2.", (2, 4))):
        lora.deltas |= random_lora({n: s for n, s in modules.items() if n.startswith(component)}, 5, ranks=ranks).deltas
    write_lora(tmp_path / "l.safetensors", lora, dialect, MODULES[pipeline.family])
    pipeline.load_lora_weights(tmp_path / "l.safetensors", adapter_name=dialect)
    theirs = {}
    for component, module in components(pipeline).items():
        for path, layer in module.named_modules():
            if hasattr(layer, "get_delta_weight") and dialect in layer.lora_A:
                theirs[full_name(component, path)] = layer.get_delta_weight(dialect)
    pipeline.unload_lora_weights()
    assert theirs.keys() == lora.deltas.keys()
    for name, delta in theirs.items():
        torch.testing.assert_close(delta, in_torch(lora.deltas[name]))


@pytest.mark.parametrize("stored", ["F32", "BF16"])
@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_each_component_of_a_file_has_one_rank_and_reading_gives_the_several_back(dialect, stored, tmp_path):
    """Diffusers before 0.40 takes the most frequent rank of a component for the alpha of all its modules."""
    lora = random_lora(MODULES["sdxl"], 8, stored=stored)
    padding = write_lora(tmp_path / "l.safetensors", lora, dialect, MODULES["sdxl"])
    shapes = {key: tensor.shape for key, tensor in load_file(tmp_path / "l.safetensors").items()}
    ranks: dict[str, set[int]] = {}
    for key, shape in shapes.items():
        if key.endswith((".lora_A.weight", ".lora_down.weight")):
            ranks.setdefault(key.split("_enc" if dialect == "kohya" else ".")[0], set()).add(shape[0])
    most: dict[str, int] = {}
    for name, delta in lora.deltas.items():
        most[name.split(".")[0]] = max(delta.rank, most.get(name.split(".")[0], 0))
    assert len(most) == 3
    assert {rank for each in ranks.values() for rank in each} == set(most.values())
    assert dialect == "kohya" or ranks == {component: {rank} for component, rank in most.items()}
    back = read_lora(tmp_path / "l.safetensors", MODULES["sdxl"])
    assert {name: delta.rank for name, delta in back.deltas.items()} == {n: c.rank for n, c in lora.deltas.items()}
    numbers = sum((most[n.split(".")[0]] - c.rank) * (c.A[0].size + len(c.B)) for n, c in lora.deltas.items())
    assert padding == numbers * (4 if stored == "F32" else 2) > 0
    # With one rank there is nothing to make equal.
    assert (
        write_lora(tmp_path / "one.safetensors", random_lora(MODULES["sd1"], 8, ranks=(3, 4)), dialect, MODULES["sd1"])
        == 0
    )


@pytest.mark.parametrize("stored", ["F16", "BF16"])
def test_a_change_of_dialect_keeps_the_type_of_every_tensor(stored, tmp_path):
    lora = random_lora(MODULES["sd1"], 4, stored=stored)  # with scales, which are folded into B
    for dialect in ("kohya", "diffusers"):
        write_lora(tmp_path / "l.safetensors", lora, dialect, MODULES["sd1"])
        assert {e.dtype for e in TensorFile(tmp_path / "l.safetensors").entries.values()} == {stored}


def test_what_a_kohya_file_says_of_itself_survives_the_way_through_another_dialect(tmp_path):
    modules, lora = MODULES["sd2"], random_lora(MODULES["sd2"], 2)
    words = {"modelspec.title": "A style", "modelspec.author": "somebody", "ss_tag_frequency": '{"1_cat": {"cat": 3}}'}
    lora.metadata.update(words | {"ss_network_dim": "77", "sshs_model_hash": "of other bytes"})
    for number, dialect in enumerate(("kohya", "diffusers", "peft", "kohya")):
        path = tmp_path / ("adapter" if dialect == "peft" else f"{number}.safetensors")
        write_lora(path, lora, dialect, modules)
        lora = read_lora(path, modules)
        assert words.items() <= lora.metadata.items()
        assert "77" not in lora.metadata.values()
    assert lora.metadata["sshs_model_hash"] != "of other bytes"
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_every_change(family, tmp_path):
    lora = random_lora({n: s for n, s in MODULES[family].items() if n.startswith("unet.")}, 6)
    write_lora(tmp_path / "l", lora, "peft", MODULES[family])
    model = PeftModel.from_pretrained(make_unet(family), tmp_path / "l" / "unet").base_model.model
    theirs = {f"unet.{path}": layer for path, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    assert theirs.keys() == lora.deltas.keys()
    for name, layer in theirs.items():
        torch.testing.assert_close(layer.get_delta_weight("default"), in_torch(lora.deltas[name]))


def test_kohya_metadata_is_what_user_interfaces_show(tmp_path):
    modules = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (320, 768)}
    lora = LoRA({name: Delta(np.ones((4, 768)), np.ones((320, 4))) for name in modules})
    tensors, about = as_kohya(lora, modules)
    wanted = {"ss_network_dim": "4", "ss_network_alpha": "4", "ss_base_model_version": "sd_v1"}
    wanted |= {"ss_network_module": "networks.lora", "modelspec.architecture": "stable-diffusion-v1/lora"}
    assert wanted.items() <= about.items()
    assert all(isinstance(value, str) for value in about.values())
    # The hash of the tensors' bytes does not depend on what else the header says.
    content = tensor_bytes(tensors, {"anything": "else"})
    first = 8 + int.from_bytes(content[:8], "little")
    assert about["sshs_model_hash"] == hashlib.sha256(content[first:]).hexdigest()


# ----------------------------------------------------------------------------------------- refusals


TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def good() -> dict[str, torch.Tensor]:
    return {f"{TO_Q}.lora_A.weight": torch.ones(2, 8), f"{TO_Q}.lora_B.weight": torch.ones(8, 2)}


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.dora_scale", "DoRA"),
        (f"{TO_Q}.lora_magnitude_vector", "DoRA"),
        ("lora_unet_x.lora_mid.weight", "Tucker"),
        ("lora_unet_x.diff", "a full difference"),
        ("lora_unet_x.diff_b", "a full difference"),
        (f"{TO_Q}.lora_B.bias", "LoRA with a bias"),
        (f"{TO_Q}.lora.up.bias", "LoRA with a bias"),
        ("lora_unet_x.lora_up.bias", "LoRA with a bias"),
        ("text_encoder.x.lora_linear_layer.up.bias", "LoRA with a bias"),
        ("lora_unet_x.bias_indices", "LoRA with a bias"),
    ],
)
def test_what_is_not_lora_is_refused_by_its_name(key, kind, tmp_path):
    save_file(good() | {key: torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=rf"x\.safetensors: .*{kind}.* is not read"):
        read_lora(tmp_path / "x.safetensors", MODULES["sd1"])


def test_what_is_wrong_with_a_file_is_said_with_the_key(tmp_path):
    path = tmp_path / "x.safetensors"

    def message(tensors, metadata=None):
        save_file(tensors, path, metadata)
        with pytest.raises(FormatError) as error:
            read_lora(path, MODULES["sd1"])
        return str(error.value)

    a, b = good()
    assert f"{a} is alone: B" in message({a: torch.ones(2, 8)})
    assert f"{b} is alone: A" in message({b: torch.ones(8, 2)})
    assert f"{a} and its partner are (2, 8) and (8, 3), which do not make" in message(good() | {b: torch.ones(8, 3)})
    assert "(2, 9) and (8, 2) but the base's weight is (8, 8)" in message(good() | {a: torch.ones(2, 9)})
    assert f"{a}, {b} or their scale 1 holds numbers that are not finite" in message(
        good() | {a: torch.full((2, 8), torch.nan)}
    )
    assert "not finite" in message(good() | {f"{TO_Q}.alpha": torch.tensor(torch.inf)})
    assert f"{TO_Q}.alpha is (2,) and should be one number" in message(good() | {f"{TO_Q}.alpha": torch.ones(2)})
    assert "mean the same matrix of" in message(good() | {f"{TO_Q}.lora.down.weight": torch.ones(2, 8)})
    assert "is not a key of a LoRA" in message(good() | {"hello": torch.ones(2)})
    assert "of types I64 and F32" in message(good() | {a: torch.ones(2, 8, dtype=torch.int64)})
    assert "init_lora_weights is 'pissa'" in message(
        good(), {"lora_adapter_metadata": '{"unet.init_lora_weights": "pissa"}'}
    )
    assert "the alpha of x is '4'" in message(good(), {"lora_adapter_metadata": '{"unet.alpha_pattern": {"x": "4"}}'})
    assert "use_dora is True" in message(good(), {"lora_adapter_metadata": '{"unet.use_dora": true}'})
    assert "it holds no tensors" in message({})
    assert unmatched_keys(path, good() | {"unet.nowhere.lora_A.weight": torch.ones(2, 8)}) == [
        "unet.nowhere.lora_A.weight"
    ]


def unmatched_keys(path, tensors):
    save_file(tensors, path)
    return read_lora(path, MODULES["sd1"]).unmatched


def test_files_that_are_not_safetensors_are_refused(tmp_path):
    torch.save(good(), tmp_path / "x.pt")
    with pytest.raises(FormatError, match="a pickle, which can run code"):
        read_lora(tmp_path / "x.pt", MODULES["sd1"])
    save_file(good(), tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for content in (whole[:-8], whole[:20], b"", b"\xff" * 100, whole.replace(b'"F32"', b'"F99"')):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(FormatError, match=r"x\.safetensors: not a safetensors file that can be read"):
            read_lora(tmp_path / "x.safetensors", MODULES["sd1"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=f"holds neither {FILE_NAME} nor adapter_config"):
        read_lora(tmp_path / "empty", MODULES["sd1"])
    (tmp_path / "empty" / "checkpoints").mkdir()
    with pytest.raises(FormatError, match=r"its run has not finished: .* --resume finishes it"):
        read_lora(tmp_path / "empty", MODULES["sd1"])


def test_a_scale_that_does_not_fit_the_type_is_refused(tmp_path):
    lora = LoRA({TO_Q: Delta(np.ones((2, 8)), np.ones((8, 2)), 1e39)})
    with pytest.raises(FormatError, match="its scale 1e"):
        write_lora(tmp_path / "x.safetensors", lora, "diffusers", MODULES["sd1"])
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_what_load_file_reads(tmp_path):
    write_lora(
        tmp_path / "x.safetensors",
        LoRA({TO_Q: Delta(np.ones((2, 8)), np.ones((8, 2)), 3.0)}),
        "diffusers",
        MODULES["sd1"],
    )
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors.keys() == good().keys()
    assert torch.equal(tensors[f"{TO_Q}.lora_B.weight"], torch.full((8, 2), 3.0))
