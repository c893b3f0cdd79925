"""Networks ``net(x, c, y=None) -> tensor like x``; they know no SDE, what c means is up to the caller."""

from sde_diffusion.networks.dit import DiT
from sde_diffusion.networks.mlp import MLP
from sde_diffusion.networks.unet import UNet

__all__ = ["MLP", "DiT", "UNet"]
