"""From what a config asks for ("auto", ...) to a device and a precision."""

from __future__ import annotations

import torch

from sde_diffusion.errors import unknown_name
from sde_diffusion.processor import computes_in_bfloat16

__all__ = ["DEVICES", "PRECISIONS", "choose_device", "choose_precision"]

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(name: str = "auto") -> torch.device:
    """The device of a name: "cpu", "cuda" (the current GPU), or "auto": a GPU if there is one.

    Raises:
        ValueError: another name, or "cuda" without a GPU.
    """
    if name not in DEVICES:
        raise unknown_name("device", name, DEVICES)
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device is 'cuda', but torch sees no GPU; use 'auto' or 'cpu'")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The precision of a network: "float32", "bfloat16", or "auto": bfloat16 where the device computes in it.

    That is GPUs with bfloat16 units, and CPUs with the AVX-512 BF16 or AMX instructions.

    Raises:
        ValueError: another name.
    """
    if name not in PRECISIONS:
        raise unknown_name("precision", name, PRECISIONS)
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = computes_in_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
