"""The training loss of one pack, without ever holding all its logits.

A vocabulary of 128 k makes the logits of 16 k tokens 8 GB, and with loss on the answers alone nearly all of them would
be thrown away. So only the positions that are learnt are projected, a chunk at a time. A chunk's gradients are made
while its logits are there, in the forward pass: they are neither kept nor made again.

The result is a SUM. Whoever knows how many targets the whole optimizer step has, over all ranks, divides.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.batch import Batch
from trainer.model.adapters import inner_model
from trainer.model.attention import packed_arguments
from trainer.model.precision import compute_context

LogitsVia = Literal["head", "model"]
Nll = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
IGNORED = -100


class PackedLoss(nn.Module):
    """Summed negative log-likelihood of a pack; the module that DDP and its like wrap.

    ``chunk``: positions projected to the vocabulary at once. ``logits_via``: ``head`` runs the decoder and then the
    output layer with the scaling the config names; ``model`` lets the model make its logits itself (all learnt
    positions of a pack at once), for models whose head does something else. The self-check says which one is right.
    ``compute_dtype``: the forward pass runs under autocast to it (float32: none). ``compiled``: the loss of a chunk
    through torch.compile, which reads and writes logits once where eager kernels pass over them in float32.
    ``neftune_alpha``: noise on the embeddings in training mode, see ``add_embedding_noise``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunk: int = 1024,
        logits_via: LogitsVia = "head",
        compute_dtype: torch.dtype = torch.float32,
        neftune_alpha: float = 0.0,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.model = model
        self.chunk = chunk
        self.logits_via: LogitsVia = logits_via
        self.compute_dtype = compute_dtype
        self.neftune_alpha = neftune_alpha
        self._nll: Nll = cast(Nll, torch.compile(_nll, dynamic=True)) if compiled else _nll
        self._scale_logits = logit_scaling(inner_model(model).config.to_dict())

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum over the targets of ``batch`` of -log p(label), float32 scalar.

        A pack without targets goes the same way and gives a zero with a (zero) gradient for every trainable parameter,
        so that ranks with and without work make the same collective calls.
        """
        positions = target_positions(batch)
        targets = batch.labels[0].index_select(0, positions)
        with compute_context(batch.input_ids.device, self.compute_dtype):
            if self.logits_via == "model":
                return self._nll(self._model_logits(batch, positions), targets)
            hidden = self._hidden(batch).index_select(0, positions)
            return self._chunked(hidden, targets)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of decoder outputs [n, H]: output layer, then the scaling of this model."""
        head = cast(nn.Module, inner_model(self.model).get_output_embeddings())
        return self._scale_logits(head(hidden))

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        arguments = packed_arguments(batch)
        if not (self.training and self.neftune_alpha > 0):
            return {"input_ids": batch.input_ids, **arguments}
        embeddings = cast(nn.Module, inner_model(self.model).get_input_embeddings())(batch.input_ids)
        noisy = add_embedding_noise(embeddings, batch.cu_seqlens, self.neftune_alpha)
        return {"inputs_embeds": noisy, **arguments}

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """Decoder outputs [T, H] after the last norm."""
        decoder = cast(nn.Module, inner_model(self.model).get_decoder())
        return decoder(**self._inputs(batch)).last_hidden_state[0]

    def _model_logits(self, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        return inner_model(self.model)(**self._inputs(batch), logits_to_keep=positions).logits[0]

    def _chunked(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(targets) <= self.chunk:  # one chunk is the most there ever is: nothing to save
            return self._chunk_loss(hidden, targets)
        pieces = list(zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True))
        if not torch.is_grad_enabled():
            return torch.stack([self._chunk_loss(*piece) for piece in pieces]).sum()
        parameters = self._head_parameters()
        if self.compute_dtype == torch.float16:
            # It needs the loss scale, which comes with the backward pass, before it rounds: logits are made twice.
            losses = [cast(torch.Tensor, checkpoint(self._chunk_loss, *piece, use_reentrant=False)) for piece in pieces]
            return torch.stack(losses).sum()
        return cast(torch.Tensor, _GradientsAtOnce.apply(hidden, targets, self.chunk, self._chunk_loss, *parameters))

    def _head_parameters(self) -> list[nn.Parameter]:
        head = cast(nn.Module, inner_model(self.model).get_output_embeddings())
        return [parameter for parameter in head.parameters() if parameter.requires_grad]

    def _chunk_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._nll(self.project(hidden), targets)


class _GradientsAtOnce(torch.autograd.Function):
    """Sum of the losses of all chunks, with the gradients made in the forward pass.

    The loss is a scalar, so what comes from above is one factor, and everything below it can be made before it is
    known. That saves one of four products with the output layer (Liger Kernel, arXiv 2410.10989, section 3.2, does the
    same), and the memory is that of one chunk's logits. The gradients can be used once.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, chunk: int, loss_of: Nll, *parameters: nn.Parameter
    ) -> torch.Tensor:
        """``hidden`` [n, H], ``targets`` int64 [n]; ``parameters``: what ``loss_of`` trains besides ``hidden``."""
        below = torch.empty_like(hidden)
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        losses: list[torch.Tensor] = []
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                piece = hidden[part].detach().requires_grad_()
                loss = loss_of(piece, targets[part])
            first, *rest = torch.autograd.grad(loss, [piece, *parameters])
            below[part] = first
            for total, gradient in zip(sums, rest, strict=True):
                total += gradient
            losses.append(loss.detach())
        ctx.save_for_backward(below, *sums)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """The factor times what is there, in place: a second backward pass would find it changed, and raises."""
        below, *sums = (tensor.mul_(gradient) for tensor in ctx.saved_tensors)
        return below, None, None, None, *sums


def target_positions(batch: Batch) -> torch.Tensor:
    """int64 [num_targets]: where the pack has labels. The count is known on the host, so no device waits for it."""
    return torch.nonzero_static(batch.labels[0] != IGNORED, size=batch.num_targets)[:, 0]


def add_embedding_noise(embeddings: torch.Tensor, cu_seqlens: torch.Tensor, alpha: float) -> torch.Tensor:
    """NEFTune (arXiv 2310.05914): embeddings [1, T, H] plus uniform noise in +-alpha / sqrt(L * H).

    L is the length of the token's own document, not of the pack: the noise of a document does not depend on what it
    was packed with.
    """
    lengths = cu_seqlens.diff().to(torch.int64)
    per_token = lengths.repeat_interleave(lengths, output_size=embeddings.shape[1])
    bound = alpha / torch.sqrt(per_token.to(torch.float32) * embeddings.shape[2])
    noise = torch.rand_like(embeddings, dtype=torch.float32).mul_(2).sub_(1) * bound[None, :, None]
    return embeddings + noise.to(embeddings.dtype)


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def logit_scaling(config: Mapping[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a model does to the output layer's product, from its ``config.json``, as a function of logits [n, V].

    Known: ``final_logit_softcapping`` (Gemma), ``logit_scale`` (Cohere), ``logits_scaling`` (Granite divides by it;
    a model of another family that has the key needs ``logits_via="model"``).
    """
    cap = config.get("final_logit_softcapping")
    factor = float(config.get("logit_scale") or 1.0)
    divisor = config.get("logits_scaling")
    if divisor and str(config.get("model_type", "")).startswith("granite"):
        factor /= float(divisor)

    def scale(logits: torch.Tensor) -> torch.Tensor:
        if factor != 1.0:
            logits = logits * factor
        return torch.tanh(logits / cap) * cap if cap else logits

    return scale
