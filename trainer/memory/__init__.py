"""How much memory a rank will need, per component, estimated before anything is loaded.

Right for decoder-only models with gated MLPs (Llama, Qwen, Mistral, SmolLM), counted tensor by tensor: what torch's
autograd saves in each operation of a layer, what a strategy gathers and reduces, what the loss holds for a chunk of
logits. ``shape`` reads a model's sizes, ``activations`` counts what the forward pass leaves, ``step`` puts one process
together, and ``divided`` shares it out among ranks. What cannot be known (a Hub model that is not on disk, another
architecture) is None and printed as unknown, never guessed.
"""

from trainer.memory.activations import Forward as Forward
from trainer.memory.activations import activation_bytes as activation_bytes
from trainer.memory.divided import Shards as Shards
from trainer.memory.divided import StrategyName as StrategyName
from trainer.memory.divided import estimate as estimate
from trainer.memory.loss_chunk import LOSS_CHUNK as LOSS_CHUNK
from trainer.memory.loss_chunk import loss_chunk as loss_chunk
from trainer.memory.shape import SMOLLM2_135M as SMOLLM2_135M
from trainer.memory.shape import TINY as TINY
from trainer.memory.shape import ModelShape as ModelShape
from trainer.memory.shape import folder_shape as folder_shape
from trainer.memory.shape import lora_parameters as lora_parameters
from trainer.memory.shape import read_shape as read_shape
from trainer.memory.step import BYTES as BYTES
from trainer.memory.step import Adapter as Adapter
from trainer.memory.step import MemoryEstimate as MemoryEstimate
