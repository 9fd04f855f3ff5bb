"""FlexGen 0.1 has its devices here."""

from flexgen.flex_opt import TorchDevice, TorchDisk, TorchMixedDevice

__all__ = ["TorchDevice", "TorchDisk", "TorchMixedDevice"]
