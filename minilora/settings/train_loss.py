"""The settings of noise and loss."""

from dataclasses import dataclass
from functools import partial

from .setting import ABOVE_0, AT_LEAST_0, Settings, setting

of_loss = partial(setting, group="noise and loss")


@dataclass(frozen=True)
class LossSettings(Settings):
    """How noise is added, and how errors count."""

    snr_gamma: float | None = of_loss(
        None, "min-SNR: weight the loss by the signal-to-noise ratio, capped at this; 5 is common", "GAMMA", ABOVE_0
    )
    huber_c: float | None = of_loss(
        None, "Huber loss: errors above this count linearly, not squared; 0.1 is common", "ERROR", ABOVE_0
    )
    dream: float | None = of_loss(
        None,
        "DREAM: also train on the U-Net's own errors; a higher power keeps more details; 1 is common",
        "POWER",
        AT_LEAST_0,
    )
    noise_offset: float = of_loss(
        0.0,
        "strength of a constant that is added to the noise of each picture and channel; 0.05 is common",
        "STRENGTH",
        AT_LEAST_0,
    )
    timestep_range: tuple[int, ...] | None = of_loss(
        None, "timesteps to train on, FROM included and TO excluded: 0,500; if not given, all", "FROM,TO"
    )

    def problems(self, given: set[str]) -> list[str]:
        wrong, range_ = super().problems(given), self.timestep_range
        if range_ is not None and not (len(range_) == 2 and 0 <= range_[0] < range_[1]):
            typed = ",".join(map(str, range_))
            wrong.append(f"--timestep-range is {typed}; it takes two numbers, the lowest and one above the highest")
        return wrong
