"""How much memory there is where the model is, and how much of it was taken."""

import resource

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``; of a GPU, what torch holds without using it counts as free."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return psutil.virtual_memory().available


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far in 10^9 bytes: allocated on a CUDA device, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
