"""lora.py: identities that must hold for any module, and PEFT as an oracle."""

import copy

import peft
import pytest
import torch
from conftest import make_tiny_text_encoder
from helpers import MLP, randomize
from helpers import MLP_TARGETS as TARGETS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minilora import (
    LoRAConv2d,
    LoRALinear,
    inject_lora,
    load_lora_state_dict,
    lora_disabled,
    lora_layers,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    set_lora_strength,
    unmerge_lora,
)
from minilora.data import draws


@pytest.fixture(params=["mlp", "text encoder", "unet"])
def example(request, tokenizer):
    """A module, its targets, and a function that calls it: LoRA must work on any of them."""
    torch.manual_seed(0)
    if request.param == "mlp":
        x = torch.randn(3, 6)
        return MLP(), TARGETS, lambda m: m(x)
    if request.param == "text encoder":
        ids = tokenizer(["red apple", "a dog"], padding="max_length", return_tensors="pt").input_ids
        model = make_tiny_text_encoder(tokenizer).eval()
        return model, ("q_proj", "v_proj", "out_proj"), lambda m: m(ids).last_hidden_state
    unet = request.getfixturevalue("tiny_unet")
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    return unet, ("to_q", "to_k", "to_v", "to_out.0"), lambda m: m(latents, torch.tensor([3, 700]), text).sample


def test_before_training_the_output_is_the_base_output(example):
    module, targets, call = example
    before = call(module)
    inject_lora(module, rank=4, targets=targets)
    assert torch.equal(call(module), before)  # B is zero, and adding zero is exact


def test_live_merged_unmerged_disabled_removed(example):
    module, targets, call = example
    originals = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    base = call(module)
    inject_lora(module, rank=4, alpha=6, targets=targets)
    randomize(module)
    live = call(module)
    assert not torch.allclose(live, base, atol=1e-3)

    merge_lora(module)
    # Float32 rounds W x + ΔW x and (W + ΔW) x differently, by a few units in the last place per layer.
    torch.testing.assert_close(call(module), live, atol=1e-5, rtol=1e-4)
    unmerge_lora(module)
    assert torch.equal(call(module), live)
    with lora_disabled(module):
        assert torch.equal(call(module), base)
    assert torch.equal(call(module), live)
    remove_lora(module)
    assert torch.equal(call(module), base)
    assert module.state_dict().keys() == originals.keys()
    assert all(torch.equal(tensor, originals[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_is_bit_exact_however_often(dtype):
    module = MLP().to(dtype)
    originals = {name: p.clone() for name, p in module.named_parameters()}
    inject_lora(module, rank=2, targets=TARGETS)
    randomize(module)
    for _ in range(50):
        merge_lora(module)
        unmerge_lora(module)
    remove_lora(module)
    assert all(torch.equal(p, originals[name]) for name, p in module.named_parameters())


def test_removing_gives_back_the_very_object():
    module = MLP()
    first, second = module.first, module.layers[1]
    inject_lora(module, rank=2, targets=("first", "1"))
    remove_lora(module)
    assert module.first is first
    assert module.layers[1] is second


def test_the_merged_weight_is_the_equation():
    base = nn.Linear(5, 3)
    weight = base.weight.detach().clone()
    layer = LoRALinear(base, rank=2, alpha=6)
    a, b = torch.randn(2, 5), torch.randn(3, 2)
    with torch.no_grad():
        layer.adapters["default"].lora_A.copy_(a)
        layer.adapters["default"].lora_B.copy_(b)
    layer.set_merged({"default"})
    torch.testing.assert_close(base.weight.detach(), weight + 3 * b @ a)  # alpha / rank = 3


def test_initialisation_is_gaussian_with_deviation_one_over_rank_and_zero():
    layer = LoRALinear(nn.Linear(4000, 16), rank=8)
    adapter = layer.adapters["default"]
    # 32 000 draws: the sample deviation is within 2 % with overwhelming probability.
    assert adapter.lora_A.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert abs(adapter.lora_A.mean().item()) < 0.005
    assert not adapter.lora_B.any()


def test_only_the_adapter_learns():
    module = MLP()
    inject_lora(module, rank=2, targets=TARGETS)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    x, y = torch.randn(8, 6), torch.randn(8, 4)
    optimizer = torch.optim.SGD(lora_parameters(module), lr=0.1)
    (module(x) - y).square().mean().backward()
    for layer in lora_layers(module).values():
        assert layer.adapters["default"].lora_B.grad.any()
        assert not layer.adapters["default"].lora_A.grad.any()  # B is zero, so A has no effect yet
    optimizer.step()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_B" not in name)
    assert [p for p in module.parameters() if p.requires_grad] == lora_parameters(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_stay_float32_over_a_half_precision_base(dtype):
    module = MLP().to(dtype)
    inject_lora(module, rank=2, targets=TARGETS)
    randomize(module)
    assert all(p.dtype == torch.float32 for p in lora_parameters(module))
    assert module(torch.randn(2, 6, dtype=dtype)).dtype == dtype


class Copies(TorchDispatchMode):
    """Within the block, note the shape and type of every copy in another type."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default:
            self.seen.append((tuple(result.shape), result.dtype))
        return result


def test_under_autocast_no_activation_is_copied_to_float32():
    layer = LoRALinear(nn.Linear(6, 10).to(torch.bfloat16), 2)
    x = torch.randn(3, 5, 6, dtype=torch.bfloat16, requires_grad=True)
    with Copies() as copies:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.sum().backward()
    a, b, half, full = (2, 6), (10, 2), torch.bfloat16, torch.float32
    assert sorted(copies.seen, key=str) == [(b, half), (b, full), (a, half), (a, full)]  # there, and their gradients


def test_the_backward_pass_ends_at_the_first_adapted_layer(tiny_unet):
    inject_lora(tiny_unet, 2, targets=("to_q",))
    in_backward = {}
    for name, module in tiny_unet.named_modules():

        def note(module, inputs, output, name=name):
            in_backward[name] = isinstance(output, torch.Tensor) and output.requires_grad

        module.register_forward_hook(note)
    tiny_unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 16))
    order = list(in_backward)  # in which they were done
    first = next(iter(lora_layers(tiny_unet)))
    before = order[: order.index(f"{first}.base") + 1]
    assert {"conv_in", "time_embedding", "down_blocks.0.resnets.0", "down_blocks.0.attentions.0.proj_in"} < {*before}
    assert not any(in_backward[name] for name in before)
    assert in_backward[first]


def test_several_adapters_add_up_and_their_strengths_are_free():
    base = nn.Linear(6, 5)
    x = torch.randn(4, 6)
    module = nn.Sequential(base)
    inject_lora(module, rank=2, targets=["0"], name="one")
    inject_lora(module, rank=3, alpha=1, targets=["0"], name="two")
    randomize(module)
    layer = module[0]
    deltas = {name: adapter.delta() for name, adapter in layer.adapters.items()}
    for one, two in [(1.0, 1.0), (0.3, -2.0), (0.0, 0.5)]:
        set_lora_strength(module, one, "one")
        set_lora_strength(module, two, "two")
        expected = base(x) + x @ (one * deltas["one"] + two * deltas["two"]).T
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)  # the order of float32 sums
        merge_lora(module)
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
        unmerge_lora(module)
    remove_lora(module, "one")
    set_lora_strength(module, 1.0)
    torch.testing.assert_close(module(x), base(x) + x @ deltas["two"].T, atol=1e-5, rtol=1e-5)
    remove_lora(module, "two")
    assert module[0] is base


def test_disabled_restores_what_it_found():
    module = MLP()
    inject_lora(module, rank=2, targets=TARGETS)
    lora_layers(module)["first"].enabled = False
    with pytest.raises(ZeroDivisionError), lora_disabled(module):
        raise ZeroDivisionError
    assert [layer.enabled for layer in lora_layers(module).values()] == [False, True, True]


LAYERS = {  # with the shape of an input, and that of what each picture's features are multiplied with
    "pictures": (nn.Linear(6, 5), (3, 6), (3, 6)),
    "tokens": (nn.Linear(6, 5), (3, 7, 6), (3, 1, 6)),
    "pixels": (nn.Conv2d(6, 5, 3, padding=1), (3, 6, 4, 4), (3, 6, 1, 1)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_leaves_out_features_of_a_picture_in_training_only(kind):
    base, shape, fitting = LAYERS[kind]
    module = nn.Sequential(base)
    [layer] = inject_lora(module, rank=2, alpha=3, targets=["0"]).values()
    randomize(module)
    x = torch.randn(shape)
    whole, adapter = module(x), layer.adapters["default"]

    adapter.dropout_mask = torch.stack([draws.dropout_mask(0, "a", position, 6, 0.0) for position in range(3)])
    assert torch.equal(module(x), whole)
    adapter.dropout_mask = torch.stack(
        [draws.dropout_mask(0, "a", position, 6, 0.5) for position in range(3)]
    )  # (batch, in)
    assert set(adapter.dropout_mask.unique().tolist()) == {0.0, 2.0}
    dropped = module(x)
    seen = x * adapter.dropout_mask.view(fitting)
    with torch.no_grad():
        adapter.dropout_mask = None
        expected = base(x) + module(seen) - base(seen)
    torch.testing.assert_close(dropped, expected, rtol=1e-5, atol=1e-5)  # the order of float32 sums
    assert not torch.allclose(dropped, whole)

    adapter.dropout_mask = torch.zeros(3, 6)
    assert torch.equal(module(x), base(x))
    module.eval()
    assert torch.equal(module(x), whole)


def test_dropout_changes_nothing_on_average():
    module, n = nn.Sequential(nn.Linear(6, 5)), 10_000
    [layer] = inject_lora(module, rank=2, targets=["0"]).values()
    randomize(module)
    x = torch.randn(6)
    layer.adapters["default"].dropout_mask = torch.stack(
        [draws.dropout_mask(0, "a", position, 6, 0.3) for position in range(n)]
    )
    outputs = module(x.expand(n, 6))  # (n, out)
    # The mean of n draws is within 5 deviations of itself.
    assert ((outputs.mean(0) - module.eval()(x)).abs() < 5 * outputs.std(0) / n**0.5).all()


def test_state_dict_round_trip_is_strict_both_ways():
    module, other = MLP(), MLP()
    inject_lora(module, rank=2, targets=TARGETS)
    inject_lora(other, rank=2, targets=TARGETS)
    randomize(module)
    state = lora_state_dict(module)
    load_lora_state_dict(other, state)
    assert all(torch.equal(v, state[k]) for k, v in lora_state_dict(other).items())

    broken = dict(state)
    del broken["first.lora_A.weight"]
    broken["second.lora_A.weight"] = torch.zeros(2, 6)
    broken["layers.0.lora_B.weight"] = torch.zeros(10, 3)
    untouched = {k: v.clone() for k, v in lora_state_dict(other).items()}
    with pytest.raises(ValueError, match=r"first\.lora_A\.weight is missing") as error:
        load_lora_state_dict(other, broken)
    assert "second.lora_A.weight has no layer" in str(error.value)
    assert "layers.0.lora_B.weight is (10, 3) and should be (10, 2)" in str(error.value)
    assert all(torch.equal(v, untouched[k]) for k, v in lora_state_dict(other).items())


def test_targets_match_on_dot_boundaries():
    module = nn.ModuleDict({"to_q": nn.Linear(4, 4), "foo_to_q": nn.Linear(4, 4)})
    assert list(inject_lora(module, rank=2, targets=["to_q"])) == ["to_q"]
    assert isinstance(module["foo_to_q"], nn.Linear)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ["first", "frist"]}, "target 'frist' matches no module"),
        ({"targets": ["layers"]}, "layers is a ModuleList"),
        ({"rank": 7}, "first maps 6 to 10 features; rank 7"),
        ({"rank": 0}, "rank 0"),
        ({"name": "a.b"}, "'a.b'"),
    ],
)
def test_what_cannot_be_injected_is_named_and_nothing_is_changed(change, message):
    module = MLP()
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        inject_lora(module, **({"rank": 2, "targets": TARGETS} | change))
    assert not lora_layers(module)
    assert all(p.requires_grad for p in module.parameters())


def test_a_second_injection_is_refused():
    module = MLP()
    inject_lora(module, rank=2, targets=TARGETS)
    with pytest.raises(ValueError, match=r"layers\.1 already has a LoRA 'default', of rank 2"):
        inject_lora(module, rank=3, targets=TARGETS)


def test_wrong_order_of_calls_is_refused():
    module = MLP()
    for function in (merge_lora, unmerge_lora, remove_lora, lora_parameters):
        with pytest.raises(ValueError, match="carries no LoRA"):
            function(module)
    inject_lora(module, rank=2, targets=TARGETS)
    with pytest.raises(RuntimeError, match="not merged"):
        unmerge_lora(module)
    merge_lora(module)
    for function in (
        merge_lora,
        remove_lora,
        lambda m: set_lora_strength(m, 0.5),
        lambda m: lora_disabled(m).__enter__(),
    ):
        with pytest.raises(RuntimeError, match="unmerge_lora first"):
            function(module)


def test_what_is_not_finite_is_not_merged():
    module = MLP()
    inject_lora(module, rank=2, targets=TARGETS)
    randomize(module)
    with torch.no_grad():
        lora_layers(module)["layers.0"].adapters["default"].lora_B[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"not finite in layers\.0$"):
        merge_lora(module)
    assert not any(layer.merged for layer in lora_layers(module).values())


def test_peft_gives_the_same_outputs_gradients_and_merged_weights(tiny_unet):
    """Same weights in: PEFT, an independent implementation, must agree to 1e-6 of each tensor's norm.

    PEFT scales after B and we before it; alpha / rank is a power of two here, so that this order
    does not round differently and, through the layers of a U-Net, hide a real difference.
    """

    def same(own: torch.Tensor, other: torch.Tensor) -> bool:
        return (own - other).norm() <= 1e-6 * other.norm()

    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
        type(tiny_unet).from_config(tiny_unet.config),
    )
    own_state = tiny_unet.state_dict()
    theirs.load_state_dict(
        {k: own_state[k.replace(".base_layer", "")] for k in theirs.state_dict() if "lora_" not in k}, strict=False
    )
    inject_lora(tiny_unet, rank=4, alpha=8)
    randomize(tiny_unet)
    for key, value in lora_state_dict(tiny_unet).items():
        theirs.get_parameter(key.removesuffix(".weight") + ".default.weight").data.copy_(value)

    latents, text, times = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.tensor([3, 700])
    own_out, their_out = tiny_unet(latents, times, text).sample, theirs(latents, times, text).sample
    assert same(own_out, their_out)
    own_out.square().mean().backward()
    their_out.square().mean().backward()
    for path, layer in lora_layers(tiny_unet).items():
        for matrix in ("lora_A", "lora_B"):
            own = getattr(layer.adapters["default"], matrix).grad
            other = theirs.get_parameter(f"{path}.{matrix}.default.weight").grad
            assert same(own, other)
    merge_lora(tiny_unet)
    for path, layer in lora_layers(tiny_unet).items():
        other = theirs.get_submodule(path)
        other.merge()
        assert same(layer.base.weight, other.base_layer.weight)


def test_peft_gives_the_same_layer_for_any_scale():
    module, other = nn.Sequential(nn.Linear(12, 9)), nn.Sequential(nn.Linear(12, 9))
    other.load_state_dict(module.state_dict())
    other = peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"]), other)
    inject_lora(module, rank=3, alpha=5, targets=["0"])
    randomize(module)
    for key, value in lora_state_dict(module).items():
        other.get_parameter(key.removesuffix(".weight") + ".default.weight").data.copy_(value)
    x = torch.randn(7, 12)
    torch.testing.assert_close(module(x), other(x), atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------------- convolutions


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (1, 3), "dilation": 2, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_a_convolution_live_merged_and_unmerged(shape):
    module = nn.Sequential(nn.Conv2d(4, 6, **shape))
    x = torch.randn(2, 4, 9, 9)
    weight = module[0].weight.detach().clone()
    [layer] = inject_lora(module, rank=3, alpha=2, targets=("0",)).values()
    assert isinstance(layer, LoRAConv2d)
    randomize(module)
    live = module(x)
    merge_lora(module)
    # float32 rounding of sums of up to 36 products
    torch.testing.assert_close(module(x), live, rtol=1e-5, atol=1e-5)
    unmerge_lora(module)
    assert torch.equal(layer.base.weight, weight)


def test_a_convolution_in_groups_is_refused():
    module = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="0 is a convolution in 2 groups"):
        inject_lora(module, rank=1, targets=("0",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loras_are_merged_and_unmerged_by_name_in_any_order(dtype):
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).to(dtype)
    before = copy.deepcopy(module.state_dict())
    inject_lora(module, rank=2, targets=("0", "1"), name="a")
    inject_lora(module, rank=3, targets=("0",), name="b")
    randomize(module)
    merge_lora(module, "a")
    only_a = [layer.base.weight.clone() for layer in lora_layers(module).values()]
    merge_lora(module, "b")
    both = module[0].base.weight.clone()
    with pytest.raises(RuntimeError, match="is merged"):
        merge_lora(module, "a")
    unmerge_lora(module, "b")
    assert all(torch.equal(w, layer.base.weight) for w, layer in zip(only_a, lora_layers(module).values(), strict=True))
    unmerge_lora(module, "a")
    merge_lora(module)
    assert torch.equal(module[0].base.weight, both)
    unmerge_lora(module)
    remove_lora(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_live_and_merged_adapters_side_by_side():
    module = nn.Sequential(nn.Linear(6, 6))
    inject_lora(module, rank=2, targets=("0",), name="a")
    inject_lora(module, rank=3, targets=("0",), name="b")
    randomize(module)
    x = torch.randn(3, 6)
    live = module(x)
    merge_lora(module, "a")
    torch.testing.assert_close(module(x), live, rtol=1e-5, atol=1e-5)  # float32 rounding
    set_lora_strength(module, 0.0, "b")
    with pytest.raises(RuntimeError, match="is merged; call unmerge_lora first"):
        set_lora_strength(module, 0.0, "a")
