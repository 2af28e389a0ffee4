"""What is computed on the host, and goes to the device without a wait."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device; neither the host nor the device waits for the copy.

    Args:
        values (Tensor): on the host, or already there.
        device (torch.device): where they are needed.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # only from pinned memory is a copy asynchronous
    return values.to(device, non_blocking=True)
