"""An initialisation of one's own: B at random. `abm-vtab --plugin noise --init noise --noise-strength 0.02`."""

from dataclasses import dataclass

from abm_vision.initializers import InitConfig, Initializer, Needs, Properties, flag, register_initializer


@dataclass(frozen=True)
class NoiseConfig(InitConfig):
    """Its settings; each is a flag of every command, `--noise-strength`."""

    strength: float = flag(0.01, "standard deviation of B")

    def __post_init__(self):
        super().__post_init__()
        if not self.strength > 0:
            raise ValueError(f"strength is {self.strength}; it must be positive")


def noise(given):
    """Change the adapter in place; `given.batches` would hold calibration batches (`Needs.BATCHES`)."""
    import torch  # here, so that --help and a wrong flag answer at once

    with torch.no_grad():
        for layer in given.layers.values():
            layer.lora_B[given.adapter_name].weight.normal_(std=given.config.strength)


register_initializer(
    Initializer("noise", "B at random", "an example", Needs.NOTHING, noise, Properties.NONE, NoiseConfig)
)
