"""ZeRO-3 without a copy of the model per rank: parameters get their numbers one at a time, and are divided at once.

Modules come without numbers (on torch's meta device). Rank 0 reads a parameter whole, DeepSpeed sends it to the others
and leaves each rank its part, and only then the next one is read: the most that a rank ever holds beside its parts is
one parameter. Parameters stay the same objects, so that an optimizer and names that were taken before still hold.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils import swap_tensors

Read = Callable[[str, int, int], torch.Tensor]
"""(name of a parameter, first element, number of elements) to its numbers, flat and in its dtype on the CPU."""
Pending = list[tuple[str, nn.Parameter]]


def without_numbers(module: nn.Module) -> Pending:
    """Parameters of ``module`` on the meta device, by name; each is now a zero on the CPU that is seen as many.

    An optimizer can be made over such, and ``divide`` gives them their numbers.
    """
    pending = [(name, parameter) for name, parameter in module.named_parameters() if parameter.is_meta]
    for _, parameter in pending:
        _become(parameter, torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))
    return pending


def divide(pending: Pending, read: Read, config: dict[str, Any], *, reads: bool) -> None:
    """Give every parameter of ``pending`` its numbers, which the rank that ``reads`` has, and have DeepSpeed divide it.

    ``config``: the one that the engine gets. All ranks call this together, DeepSpeed imported and its group there.
    """
    from deepspeed.accelerator import get_accelerator  # type: ignore[import-not-found]
    from deepspeed.comm import init_distributed  # type: ignore[import-not-found]
    from deepspeed.runtime.zero import Init  # type: ignore[import-not-found]

    convert: Callable[..., None] | None = None
    for name, parameter in pending:
        shape, dtype = parameter.shape, parameter.dtype
        numbers = read(name, 0, shape.numel()).view(shape) if reads else torch.empty(shape, dtype=dtype)
        _become(parameter, numbers)
        del numbers
        if convert is None:
            alone = nn.Module()
            alone.register_parameter("first", parameter)
            backend = cast(Any, get_accelerator()).communication_backend_name()
            init_distributed(backend, verbose=False)  # as the engine would do later
            Init(module=alone, config_dict_or_path=config)
            convert = parameter.convert_to_zero_parameters  # type: ignore[attr-defined]  # DeepSpeed has put it there
        else:
            convert(param_list=[parameter])


def _become(parameter: nn.Parameter, numbers: torch.Tensor) -> None:
    """Exchange what is in ``parameter``; whoever holds it sees the new."""
    swap_tensors(parameter, nn.Parameter(numbers, parameter.requires_grad))
