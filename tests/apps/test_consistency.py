"""apps/consistency: the consistency function is diffusers', and the loop learns it like any other."""

from dataclasses import replace

import pytest
import torch
from diffusers import LCMScheduler
from helpers import CPU
from safetensors.torch import load_file
from torch.func import functional_call

from minilora import inject_lora, lora_disabled, lora_parameters
from minilora.apps.consistency import LatentConsistency, boundary_scalings, consistency
from minilora.apps.ddim import ddim_step, guided
from minilora.data.examples import Batch
from minilora.diffusion import PREDICTION_TYPES, Conditioning, add_noise
from minilora.models.base import Base
from minilora.run import checkpoint
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig
from minilora.training import train

CONFIG = TrainConfig(data=("not read",), model="not read")


@pytest.fixture
def base(tiny_base) -> Base:
    """The tiny base with a LoRA that changes much."""
    base = Base(str(tiny_base), CPU)
    inject_lora(base.unet, rank=2)
    torch.manual_seed(0)
    for parameter in lora_parameters(base.unet):
        torch.nn.init.normal_(parameter, std=0.3)
    return base


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    text = Conditioning(torch.randn(3, 32, 16, generator=generator))
    return Batch((5, 6, 7), latents, text, noise, noise[:, :, :1, :1], None, torch.ones(3), torch.ones(3, 1, 1, 1))


def started(base: Base, **settings) -> LatentConsistency:
    objective = LatentConsistency((2.0, 4.0), **settings)
    objective.begin(base.unet, replace(CONFIG, model=base.source))
    return objective


# ------------------------------------------------------------------------- the consistency function


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_consistency_function_is_what_diffusers_draws_with(base, batch, prediction_type):
    schedule = replace(base.schedule, prediction_type=prediction_type)
    config = dict(base.scheduler.config) | {"prediction_type": prediction_type}
    scheduler = LCMScheduler.from_config(config)
    for t in (0, 19, 999):
        scheduler.set_timesteps(50)
        scheduler.set_begin_index(3)  # any; it says only where the next step goes
        ours = consistency(batch.noise, batch.latents, torch.tensor([t] * 3), schedule)
        theirs = scheduler.step(batch.noise, t, batch.latents).denoised
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # float32; dividing by √ᾱ magnifies it
        c_skip, c_out = boundary_scalings(torch.tensor([t]))
        wanted = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert (c_skip.item(), c_out.item()) == pytest.approx(wanted, abs=1e-7)


def test_at_the_end_of_the_path_it_is_the_end_itself(base, batch):
    ours = consistency(batch.noise, batch.latents, torch.zeros(3, dtype=torch.long), base.schedule)
    assert torch.equal(ours, batch.latents)


def test_its_levels_are_those_that_lcm_scheduler_draws_through(base):
    scheduler = LCMScheduler.from_config(base.scheduler.config)
    scheduler.set_timesteps(50)
    t, t_next = started(base).neighbours(tuple(range(2000)), base.schedule, seed=0)
    assert sorted(set(t.tolist()), reverse=True) == scheduler.timesteps.tolist()
    follows = dict(zip(scheduler.timesteps.tolist(), [*scheduler.timesteps.tolist()[1:], 0], strict=True))
    assert [follows[here] for here in t.tolist()] == t_next.tolist()


# ------------------------------------------------------------------------------------------ the loss


def test_the_loss_is_between_the_trained_and_the_target_on_the_teachers_path(base, batch):
    objective, schedule = started(base), base.schedule
    with torch.no_grad():
        for parameter in lora_parameters(base.unet):
            parameter.mul_(0.5)  # the target stays
    found = objective.loss(base.unet, batch, schedule, CONFIG)

    t, t_next = objective.neighbours(batch.positions, schedule, CONFIG.seed)
    x = add_noise(batch.latents, batch.noise, t, schedule)
    with torch.no_grad():
        teacher = Base(base.source, CPU).unet  # one that never had a LoRA
        for row, guidance in enumerate(objective.drawn_guidance(batch.positions, CONFIG.seed).flatten().tolist()):
            one = slice(row, row + 1)
            predict = guided(teacher, batch.conditioning.text[one], objective.empty, guidance)
            here, there = schedule.alpha_bar(t[one]), schedule.alpha_bar(t_next[one])
            x_next = ddim_step(x[one], predict(x[one], t[row]), here, there, schedule.prediction_type)
            target = functional_call(
                base.unet, objective.target, (x_next, t_next[one], batch.conditioning.text[one])
            ).sample
            ours = base.unet(x[one], t[one], batch.conditioning.text[one]).sample
            difference = consistency(ours, x[one], t[one], schedule) - consistency(
                target, x_next, t_next[one], schedule
            )
            wanted = ((difference.square() + 1e-6).sqrt() - 1e-3).mean()
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)  # another size of batch


def test_the_guidance_is_drawn_between_its_ends(base):
    drawn = started(base).drawn_guidance(tuple(range(500)), seed=0)
    assert 2 <= drawn.min() < 2.1
    assert 3.9 < drawn.max() <= 4


def test_only_the_lora_gets_a_gradient_and_only_through_the_trained_side(base, batch):
    objective = started(base)
    objective.loss(base.unet, batch, base.schedule, CONFIG).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in lora_parameters(base.unet))
    assert not any(tensor.requires_grad for tensor in objective.state().values())


def test_the_lowest_level_leads_to_the_teachers_own_end(base, batch):
    """There f_θ⁻(x, 0) = x whatever θ⁻ is, so the teacher alone says what is right."""
    objective = started(base)
    objective.neighbours = lambda *_: (torch.tensor([19] * 3), torch.tensor([0] * 3))
    before = objective.loss(base.unet, batch, base.schedule, CONFIG)
    for tensor in objective.target.values():
        tensor.zero_()
    torch.testing.assert_close(objective.loss(base.unet, batch, base.schedule, CONFIG), before, rtol=0, atol=0)


def test_where_both_places_are_one_and_nothing_has_moved_the_loss_is_zero(base, batch):
    objective = started(base)
    objective.neighbours = lambda *_: (torch.tensor([500] * 3), torch.tensor([500] * 3))
    loss = objective.loss(base.unet, batch, base.schedule, CONFIG)
    # A DDIM step to where one is gives x back up to float32 rounding, about 1e-6 and much below HUBER.
    torch.testing.assert_close(loss, torch.zeros(3), rtol=0, atol=1e-6)


def test_the_target_moves_by_its_formula(base):
    objective = started(base, decay=0.9)
    names = [name for name, parameter in base.unet.named_parameters() if parameter.requires_grad]
    assert list(objective.state()) == names
    wanted = {name: tensor.clone() for name, tensor in objective.state().items()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in lora_parameters(base.unet):
                parameter.add_(0.1)
        objective.after_step()
        wanted = {name: 0.9 * wanted[name] + 0.1 * base.unet.get_parameter(name) for name in names}
    for name in names:
        torch.testing.assert_close(objective.state()[name], wanted[name].detach())


def test_while_the_lora_moves_the_teacher_stays_the_base(base, batch):
    t, untouched = torch.tensor(500), Base(base.source, CPU)
    with torch.no_grad(), lora_disabled(base.unet):
        assert torch.equal(
            base.unet(batch.noise, t, batch.conditioning.text).sample,
            untouched.unet(batch.noise, t, batch.conditioning.text).sample,
        )


# ------------------------------------------------------------------------------------------ the loop


@pytest.fixture
def learn(pictures, tmp_path, tiny_base):
    """Distil the tiny base on five small pictures; return the LoRA file."""

    def learn(name: str, objective=None, **settings):
        places = {"data": (str(pictures),), "output": str(tmp_path / name), "cache": str(tmp_path / "cache")}
        defaults = {"steps": 6, "batch_size": 4, "rank": 2, "learning_rate": 0.01, "model": str(tiny_base)}
        return train(TrainConfig(**(places | defaults | settings)), objective or LatentConsistency((2.0, 4.0)))

    return learn


def test_a_distillation_that_was_cut_in_two_gives_the_same_bytes(learn):
    whole = learn("whole").read_bytes()
    cut = learn("cut", steps=4, checkpoint_every=4).parent
    state = load_file(checkpoint.path_of(cut, 4))
    moved = [key for key in state if key.startswith("objective.") and "lora_B" in key and state[key].any()]
    assert moved  # the target is in the checkpoint
    assert learn("cut", resume=True).read_bytes() == whole
    with pytest.raises(UserError, match=r"objective was LatentConsistency.*decay=0\.95.* is LatentConsistency.*0\.5"):
        learn("cut", LatentConsistency((2.0, 4.0), decay=0.5), resume=True)


def test_micro_batches_give_the_distillation_of_the_whole_batch(learn):
    one, two = load_file(learn("one")), load_file(learn("two", micro_batch_size=1))
    # The order of float32 sums, magnified by Adam where a gradient is nearly zero.
    assert all(torch.allclose(one[key], two[key], rtol=1e-2, atol=1e-4) for key in one)
