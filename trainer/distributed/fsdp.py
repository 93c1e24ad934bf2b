"""The strategy in which every rank owns a part of everything: weights, gradients and optimizer state (FSDP2).

torch's ``fully_shard`` is called directly, on a CPU and on a GPU alike: accelerate's own FSDP silently becomes DDP on a
CPU. Each decoder layer is gathered for its forward and for its backward pass and given back after each; embeddings,
last norm and output layer are one more group around them, gathered for a whole micro-batch. Whether parameters really
are shards is read off the parameters after ``prepare``, not off a setting.

Number formats. Masters, gradients that are reduced, and optimizer state are float32. The module computes under autocast
by itself; still, in 16 bits the layers are gathered in the compute dtype (``layer_policy``): a gathered float32 matrix
would be cast by autocast, and the graph keeps that cast, which nobody frees after the forward pass: every rank would
hold the whole model in 16 bits until the backward pass is over. What a product sees are the same bits either way; norm
weights and biases of the layers are rounded too, which autocast would not do. With LoRA a layer holds a frozen base in
the compute dtype and float32 adapters; gathered in the compute dtype the two are one buffer. The outer group is
gathered as it is stored, so that the residual stream starts in the dtype it has under the other strategies.

Hybrid sharding: ranks in groups of ``Sharding.ranks`` neighbours cut the model among themselves, and the groups are
replicas whose gradients are summed. Weights are gathered inside a group only, which is one machine when a group has as
many ranks as a machine. Everything a rank owns then exists once per group; the first group writes checkpoints.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from trainer.distributed.fragments import MOMENTS, Fragment, adam_state
from trainer.distributed.prepared import Prepared, prepared, trainable_parameters
from trainer.distributed.ranks import Ranks
from trainer.errors import TrainingFault
from trainer.fingerprint import digest

OVER_GROUPS, IN_GROUP = "replicate", "shard"
"""Dimensions of a mesh."""
ROWS = Shard(0)
"""Every parameter is cut by rows, as ``torch.chunk`` cuts: the last ranks may have fewer, or none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sharding:
    """How a model is cut and when its parts are together.

    ``layers``: the modules that are gathered one at a time, the decoder layers. ``reshard_after_forward``: give a
    layer's weights back after its forward pass; False keeps them until its backward pass (less traffic, more memory).
    ``reduce_every_micro_batch``: reduce gradients into shards after each micro-batch; False adds them up whole on every
    rank and reduces once in a step. ``gather_for_generation``: hold the whole model on every rank in ``gathered()``.
    ``read``: (name of a parameter, first element, number of elements) to its numbers, flat and in its dtype on the CPU,
    for parameters that are on the meta device: no rank then ever has the whole model. None: all have their numbers.
    ``ranks``: among how many the model is cut, a divisor of all of them; None: all. ``offload``: what a rank owns of
    weights, gradients and optimizer state is in main memory, and its CPUs take the step.
    """

    layers: Sequence[nn.Module]
    reshard_after_forward: bool = True
    reduce_every_micro_batch: bool = False
    gather_for_generation: bool = True
    ranks: int | None = None
    offload: bool = False
    read: Callable[[str, int, int], torch.Tensor] | None = None


class FullySharded(Prepared):
    """Every rank owns rows of every parameter and of its optimizer state; layers are gathered while they compute."""

    def __init__(self, ranks: Ranks, sharding: Sharding, *, dtype: torch.dtype, clip_norm: float) -> None:
        super().__init__(ranks, replicated=False, in_step=not sharding.gather_for_generation, clip_norm=clip_norm)
        self._sharding = sharding
        self._dtype = dtype
        self._root: FSDPModule | None = None
        self._layers: list[FSDPModule] = []
        self._mesh: DeviceMesh | None = None

    @property
    def _group(self) -> DeviceMesh:
        """The ranks among which the model is cut, this one in them."""
        return prepared(self._mesh)[IN_GROUP]

    @property
    def _owned_on(self) -> torch.device:
        """Where what a rank owns is, while nothing computes with it."""
        return torch.device("cpu") if self._sharding.offload else self.ranks.device

    @property
    def _in_first_group(self) -> bool:
        return self.ranks.rank < self._group.size()

    def prepare(self, module: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Cut ``module`` into shards and make the optimizer over them.

        Raises:
            TrainingFault: nothing to train, parameters that are not fp32, layers that are not in ``module``, ranks with
                other weights, or parameters that are not the planned shards afterwards.
        """
        trainable_parameters(module)
        _check_layers(module, self._sharding.layers)
        # Every rank keeps rows of its own copy: of copies that differ they would become a model that nobody has.
        self.ranks.same_on_all_ranks(_weights_digest(module), what="weights before they are sharded")
        dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
        self._mesh = mesh = device_mesh(self.ranks, self._sharding.ranks)
        policy, reshard = layer_policy(self._dtype), self._sharding.reshard_after_forward
        offload = offload_policy(self.ranks.device) if self._sharding.offload else OffloadPolicy()
        self._layers = [
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)
            for layer in self._sharding.layers
        ]
        self._root = fully_shard(module, mesh=mesh, reshard_after_forward=False, offload_policy=offload)
        if self._sharding.read is not None:
            fill_shards(module, mesh, self._sharding.read, self._owned_on)
        check_shards(module, mesh, dtypes, self._owned_on)
        # Otherwise whichever module computes first becomes the root, and in generation that is a layer.
        self._root._get_fsdp_state()._lazy_init()
        self._module = module  # sharding changes it in place and wraps nothing
        self._take(module)
        self._optimizer = make_optimizer(module)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Reduce gradients in the ``last`` micro-batch, or in each; only after the last one somebody waits for it."""
        root = prepared(self._root)
        root.set_requires_gradient_sync(last or self._sharding.reduce_every_micro_batch)
        root.set_requires_all_reduce(last)  # between groups; only hybrid sharding has some
        root.set_is_last_backward(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss``; ``fully_shard`` averages them over the ranks."""
        loss.backward()

    def clip(self) -> torch.Tensor:
        """Global L2 norm over the shards of all ranks; ``clip_norm`` 0 only measures it."""
        gradients = [p.grad for p in self._trainable.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # As a plain number: a DTensor may still be one part per rank, and every product with it would sum them anew.
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self._clip_norm > 0:
            nn.utils.clip_grads_with_norm_(list(self._trainable.values()), self._clip_norm, whole)
        return whole.to(self.ranks.device)

    def step(self) -> None:
        """Optimizer step on the shards, then clear the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def fragments(self, *, saving: bool) -> Iterator[Fragment]:
        """This rank's rows of every parameter that has some for it; groups have the same, and the first one writes."""
        if saving and not self._in_first_group:
            return
        group = self._group
        for name, parameter in self._trainable.items():
            state = adam_state(self.optimizer, parameter)
            whole = {"param": parameter.detach(), **{key: state[key] for key in MOMENTS}}
            flat = {key: local(tensor).view(-1) for key, tensor in whole.items()}
            start, length = shard_of(parameter.shape, rank=group.get_local_rank(), world_size=group.size())
            if length:
                yield Fragment(name, start, tuple(parameter.shape), state["step"], flat)

    def refresh(self) -> None:
        """Give back what is gathered, so that the next forward pass gathers what was written."""
        for part in (prepared(self._root), *self._layers):
            part.reshard()

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Gathered one at a time; no rank ever holds two."""
        for name, parameter in self._trainable.items():
            whole = parameter.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            yield name, whole if self.ranks.is_first else None

    @contextmanager
    def gathered(self, *, layers: bool | None = None) -> Iterator[nn.Module]:
        """The outer group is whole; the ``layers`` (None: with ``gather_for_generation``) are too, or one at a time."""
        root, whole = prepared(self._root), self._sharding.gather_for_generation if layers is None else layers
        root.unshard()
        for layer in self._layers if whole else []:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        try:
            yield self.inner
        finally:
            for layer in self._layers:
                layer.set_reshard_after_forward(self._sharding.reshard_after_forward, recurse=False)
            self.refresh()


def device_mesh(ranks: Ranks, together: int | None) -> DeviceMesh:
    """All ranks in groups of ``together`` neighbours (None: one group), which cut the model among themselves.

    Raises:
        TrainingFault: the ranks do not divide into such groups.
    """
    size = ranks.world_size if together is None else together
    groups, rest = divmod(ranks.world_size, size)
    if rest or (together is not None and together < 2):
        raise TrainingFault(
            "the ranks do not divide into groups that cut a model among themselves",
            got=f"{ranks.world_size} ranks in groups of {size}",
            allowed="groups of at least 2 ranks, all of one size",
            do="plan again: `python -m trainer plan` with the same overrides",
        )
    if groups == 1:
        return init_device_mesh(ranks.device.type, (size,), mesh_dim_names=(IN_GROUP,))
    return init_device_mesh(ranks.device.type, (groups, size), mesh_dim_names=(OVER_GROUPS, IN_GROUP))


def offload_policy(device: torch.device) -> CPUOffloadPolicy:
    """What a rank owns is in main memory, page-locked where a GPU copies from it."""
    return CPUOffloadPolicy(pin_memory=device.type == "cuda")


def layer_policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Layers are gathered in the compute ``dtype`` and their gradients reduced in float32 (see the module's text)."""
    if dtype == torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def shard_of(shape: Sequence[int], *, rank: int, world_size: int) -> tuple[int, int]:
    """(first element, number of elements) of ``rank`` in the flattened parameter: ``torch.chunk`` over its rows."""
    rows, row = -(-shape[0] // world_size), prod(shape[1:])
    first, last = min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])
    return first * row, (last - first) * row


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, as a live view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill_shards(
    module: nn.Module, mesh: DeviceMesh, read: Callable[[str, int, int], torch.Tensor], device: torch.device
) -> None:
    """Give every sharded parameter of ``module`` that is on the meta device this rank's rows, on ``device``."""
    group, state = mesh[IN_GROUP], dict[str, nn.Parameter]()
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not isinstance(parameter, DTensor) or not local(parameter).is_meta:
            continue
        if id(parameter) not in filled:
            start, length = shard_of(parameter.shape, rank=group.get_local_rank(), world_size=group.size())
            rows = read(name, start, length).view(-1, *parameter.shape[1:]).to(device)
            whole = DTensor.from_local(
                rows, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
            filled[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        state[name] = filled[id(parameter)]
    module.load_state_dict(state, strict=False, assign=True)


def check_shards(module: nn.Module, mesh: DeviceMesh, dtypes: Mapping[str, torch.dtype], device: torch.device) -> None:
    """Check that every parameter of ``module``, trained or frozen, is cut by rows over ``mesh`` in its own dtype.

    And that what this rank owns of it is on a ``device`` of that type.

    Raises:
        TrainingFault: one is not; the message says what it is.
    """
    group = mesh[IN_GROUP]
    planned = " and ".join(repr(ROWS if name == IN_GROUP else Replicate()) for name in mesh.mesh_dim_names or ())
    planned = f"{planned} over {mesh.size()} ranks"
    for name, parameter in module.named_parameters():
        got = _describe(parameter)
        wanted = f"{planned} in {dtypes[name]}"
        if got == wanted and isinstance(parameter, DTensor):
            _, length = shard_of(parameter.shape, rank=group.get_local_rank(), world_size=group.size())
            held = local(parameter.detach()).numel()
            got, wanted = f"{held} elements on this rank", f"{length} elements"
            if held == length:
                place = local(parameter.detach()).device.type
                if place == device.type:
                    continue
                got, wanted = f"rows on the {place}", f"rows on the {device.type}"
        raise TrainingFault(
            "a parameter is not sharded as planned",
            where=name,
            got=got,
            allowed=wanted,
            do="report this together with env.json of the run",
        )


def _weights_digest(module: nn.Module) -> str:
    """A digest of all weights that are here, which tells copies apart: sums in float64, not every byte."""
    here = [(name, p.detach()) for name, p in module.named_parameters() if not p.is_meta]
    return digest([[name, float(p.sum(dtype=torch.float64))] for name, p in here])


def _describe(parameter: torch.Tensor) -> str:
    if not isinstance(parameter, DTensor):
        return f"a whole {type(parameter).__name__} in {parameter.dtype}"
    cut = " and ".join(repr(placement) for placement in parameter.placements)
    return f"{cut} over {parameter.device_mesh.size()} ranks in {parameter.dtype}"


def _check_layers(module: nn.Module, layers: Sequence[nn.Module]) -> None:
    inside = set(module.modules())
    foreign = [layer for layer in layers if layer not in inside]
    if foreign or not layers:
        raise TrainingFault(
            "there are no decoder layers to shard one by one: every rank would gather the whole model at once",
            got=f"{len(layers)} layers, {len(foreign)} of them not in this model",
            allowed="the decoder layers of the model",
            do="use parallel=ddp, and report the name of the base model",
        )
