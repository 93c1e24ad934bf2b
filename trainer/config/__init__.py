"""What the user may write: one dataclass per section of the config, one docstring per field.

These classes are the whole surface. ``compose/`` fills them from ``conf/`` and the command line and reports every key
or value that does not fit; ``rules/`` checks what several fields say together. Nothing below the door
(``prepare.py``, ``worker.py``) hands a config object on: they pass plain arguments.

A section that is also a folder of ``conf/`` is a Hydra group: ``method=lora`` chooses a file, ``method.rank=8`` sets a
field. ``null`` means "decide for me" and is only allowed where the type says so.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from trainer.config.bounds import Count, Natural, NonNegative, Positive, Probability, Seed, Share
from trainer.config.cost import CostConfig
from trainer.config.launch import LaunchConfig
from trainer.config.tracking import TrackingConfig

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TaskName = Literal["classification", "extraction", "summary", "chat", "text"]
OverLong = Literal["error", "drop", "truncate", "split"]
RecordFormat = Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text"]
BaselineName = Literal["zero_shot"]

LEGAL_TASKS: dict[str, tuple[TaskName, ...]] = {
    "clause_type": ("classification",),
    "license_category": ("classification",),
    "clause_heading": ("summary",),
    "defined_terms": ("extraction",),
    "governing_law": ("extraction",),
    "copyright_holder": ("extraction",),
}
"""The built-in legal tasks and how each is scored."""


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Where the run lives and what makes it repeatable."""

    name: str = "run"
    """First folder below ``run.root``; an experiment's file name unless it is given."""
    root: str = "outputs"
    """Runs are ``<root>/<name>/<identity>/``."""
    dir: str | None = None
    """Exactly this run folder instead. A folder that holds a run of another identity is refused."""
    seed: Seed = 0
    """Seed of data order, initial adapter weights and dropout."""
    time_limit: Positive | None = None
    """Minutes after which this start of the run saves and stops in good order (exit 75)."""
    cache: str = "~/.cache/trimtab"
    """Tokenised data, converted models and the built-in data; content-addressed, safe to delete."""


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The base model."""

    path: str = "builtin:smollm2-135m-instruct"
    """A folder, a Hub id, ``builtin:smollm2-135m-instruct`` or ``builtin:tiny`` (made on the spot, for smoke tests)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; the commit it resolves to is recorded."""
    dtype: Dtype = "auto"
    """Compute dtype. ``auto`` probes once what is fast on this machine and records it with the run."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Needs a pinned ``model.revision`` for a Hub id."""
    chat_template: str | None = None
    """``builtin:NAME`` or a Jinja file that replaces the tokenizer's own template."""
    add_tokens: list[str] = field(default_factory=list[str])
    """Tokens that the vocabulary does not have; their embeddings are trained, with LoRA too (theirs alone)."""
    add_special_tokens: list[str] = field(default_factory=list[str])
    """The same for control tokens, say those of a chat template: left out of answers, refused in the text of rows."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a
    third more time. null: off, and ``parallel=auto`` turns it on where nothing fits without it."""
    compile: bool | None = None
    """Decoder layers through torch.compile. null: on a GPU, where Triton and a C compiler are there."""


@dataclass(slots=True, kw_only=True)
class SourceConfig:
    """One part of a weighted mixture."""

    path: str
    """File, folder or ``hub:ORG/NAME``, as in ``data.train``."""
    weight: Positive = 1.0
    """Rows of this part are repeated or thinned so that parts are seen in the ratio of their weights."""


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Training, validation and test rows."""

    kind: Literal["files", "legal", "smoke"] = "files"
    """``files``: own data (also from the Hub); ``legal``: the built-in legal tasks; ``smoke``: made on the spot."""
    train: list[str] = field(default_factory=list[str])
    """Files (.jsonl .json .csv .parquet), folders of them, or ``hub:ORG/NAME[/SUBSET][:SPLIT]``. One path may be given
    without brackets."""
    validation: list[str] = field(default_factory=list[str])
    """As ``data.train``; empty: taken from the training rows by ``data.validation_share``."""
    test: list[str] = field(default_factory=list[str])
    """As ``data.train``; empty: taken from the training rows by ``data.test_share``."""
    mixture: list[SourceConfig] = field(default_factory=list[SourceConfig])
    """Weighted parts instead of ``data.train``."""
    revision: str | None = None
    """Branch, tag or commit of every Hub id of this section; the resolved commit is recorded."""
    tasks: list[str] = field(default_factory=list[str])
    """Built-in legal tasks to use (``data.kind=legal``)."""
    format: RecordFormat = "auto"
    """Shape of a row; ``auto`` recognises it from the columns."""
    columns: dict[str, str] = field(default_factory=dict[str, str])
    """Canonical name to the column's real name, for example ``{prompt: question, completion: reply}``."""
    system: str | None = None
    """System prompt for rows that have none."""
    label_column: str | None = None
    """Column with the class of a row; made splits keep its shares."""
    group_column: str | None = None
    """Rows with the same value never fall into different splits."""
    slice_columns: list[str] = field(default_factory=list[str])
    """Columns by which results are broken down."""
    validation_share: Probability = 0.05
    """Share of rows (whole groups) for validation where none is given."""
    test_share: Probability = 0.1
    """Share of rows (whole groups) for the frozen test split where none is given."""
    split_seed: Seed = 0
    """Seed of made splits; not the run's seed, so that runs of several seeds are tested on the same rows."""
    max_train_rows: Count | None = None
    """Take this many training rows (seeded by ``data.split_seed``)."""
    max_validation_rows: Count | None = None
    """Take this many validation rows."""
    max_test_rows: Count | None = None
    """Take this many test rows."""
    max_characters: Count | None = None
    """Built-in legal tasks: cut a clause to this many characters before it goes into the prompt."""
    over_long: OverLong = "error"
    """What happens to a document longer than ``packing.capacity``: ``error``, ``drop`` it, ``truncate`` it, or
    ``split`` it into overlapping chunks. Applied once, counted and printed."""
    split_overlap: Natural = 64
    """Tokens that a chunk repeats from the one before it (no loss on them), with ``over_long=split``."""
    max_dropped_share: Share = 0.1
    """Refuse to run when a larger share of the rows has to be left out."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Learn the assistant's turns, or every token. Plain text always learns every token."""


@dataclass(slots=True, kw_only=True)
class TaskConfig:
    """What is asked of the model, and how an answer is scored."""

    name: TaskName = "chat"
    """``classification``, ``extraction``, ``summary``, ``chat``: an answer is generated and scored;
    ``text``: loss only."""
    labels: list[str] = field(default_factory=list[str])
    """Classification: the allowed answers; empty: those of the training rows."""
    max_new_tokens: Count = 64
    """Longest generated answer, in tokens."""


@dataclass(slots=True, kw_only=True)
class MethodConfig:
    """Which weights are trained."""

    name: Literal["full", "lora"] = "lora"
    """``full``: all weights; ``lora``: low-rank adapters on a frozen base."""
    rank: Count = 16
    """LoRA rank."""
    alpha: Positive = 32.0
    """LoRA scale: the update is multiplied by ``alpha / rank`` (``alpha / sqrt(rank)`` with rsLoRA)."""
    dropout: Probability = 0.0
    """Dropout on the adapter's input."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the modules that get an adapter (``q_proj``, ...), or ``all-linear``."""
    layers: str | None = None
    """Layers that get an adapter: ``15:`` (from 15 on), ``:8``, ``4:12``, ``-10:`` (the last ten); null: all."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapters (arXiv 2402.09353)."""
    adapter: str | None = None
    """Continue from this adapter folder; its rank, targets and scale are used, and must not be given otherwise."""
    quantize: Literal["nf4"] | None = None
    """LoRA: hold the linear layers of the frozen base in 4 bits (QLoRA, arXiv 2305.14314); null: in the compute dtype.
    Needs bitsandbytes. ``method=qlora`` sets it."""
    freeze_layers: Natural = 0
    """Full fine-tuning: keep the first N decoder layers as they are."""
    freeze_embeddings: bool = False
    """Full fine-tuning: keep the embeddings (and a tied output layer) as they are."""


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """Optimizer, schedule and global batch."""

    lr: Positive = 2.0e-4
    """Peak learning rate."""
    betas: Annotated[list[Probability], Meta(min_length=2, max_length=2)] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's betas."""
    eps: Positive = 1.0e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay on matrices; norms, biases and embeddings have none."""
    schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    """Learning rate after the warm-up."""
    warmup: Share = 0.03
    """Share of the steps with a linear warm-up."""
    min_lr_ratio: Share = 0.0
    """The schedule ends at this share of the peak."""
    epochs: Positive = 1.0
    """Passes over the training rows; fractions are allowed."""
    max_steps: Count | None = None
    """Train exactly this many optimizer steps, however many passes that takes; ``optim.epochs`` does not count then."""
    batch_packs: Count | None = None
    """Global batch in packs per optimizer step over all ranks. Give this or ``optim.batch_tokens``; neither: 8."""
    batch_tokens: Count | None = None
    """Global batch in tokens (a multiple of ``packing.capacity``)."""
    clip_norm: NonNegative = 1.0
    """Largest global gradient norm; 0: no clipping."""
    neftune_alpha: NonNegative = 0.0
    """Noise on the embeddings while training (arXiv 2310.05914); 0: none."""


@dataclass(slots=True, kw_only=True)
class PackingConfig:
    """How documents become micro-batches. Documents of a pack never see each other."""

    capacity: Annotated[int, Meta(ge=8)] | Literal["auto"] = 2048
    """Tokens per pack, and so per micro-batch of a rank.
    ``auto``: the largest power of two that fits into the memory, up to 32768, and divides ``optim.batch_tokens`` among
    the ranks."""
    algorithm: Literal["rfc", "ffd", "bfd"] = "rfc"
    """``rfc``: random-fill-close, keeps steps random samples; ``ffd``, ``bfd``: first- and best-fit decreasing."""
    max_documents: Count | None = None
    """Most documents in one pack."""
    cost: Literal["tokens", "time"] = "tokens"
    """What fills a pack. ``tokens``: its documents' tokens. ``time``: their time, so that all packs, and all ranks,
    take equally long: a document of n tokens counts ``n + cost_ratio * n**2`` of the capacity, never less than n."""
    cost_ratio: Annotated[float, Meta(gt=0)] | None = None
    """For ``cost=time``, in 1 / tokens: time of a pair of tokens in attention over that of a token in everything else;
    null: from the model's shape. A run prints the ratio that it measured."""

    @property
    def tokens(self) -> int:
        """``capacity`` as a number, which a plan has made of ``auto``."""
        if self.capacity == "auto":
            raise AssertionError("packing.capacity=auto is decided by the plan")
        return self.capacity


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the work."""

    name: Literal["auto", "ddp", "fsdp", "zero1", "zero2", "zero3"] = "auto"
    """``ddp``: a replica per rank; ``fsdp``: a shard per rank of weights, gradients and optimizer state; ``zero1``,
    ``zero2``, ``zero3``: DeepSpeed divides optimizer state, and gradients, and weights; ``auto``: the fastest that fits
    into the memory, in the order of docs/which_layout.md."""
    memory_reserve: Probability = 0.1
    """Share of a device's memory that ``auto`` leaves free: for CUDA itself,
    fragments, and what the estimate misses."""
    reshard_after_forward: bool = True
    """fsdp: give a layer's gathered weights back after its forward pass and gather them again in the backward pass;
    false keeps them: less traffic, more memory."""
    reduce_every_micro_batch: bool = False
    """fsdp: reduce gradients into shards after every micro-batch; false adds them up whole on every rank (float32, of
    all trained weights) and reduces once in an optimizer step: less traffic, more memory."""
    gather_for_generation: bool = True
    """fsdp, zero3: hold the whole model on every rank while answers are generated; false gathers a layer at a time for
    every token: any model fits, and it is slow."""
    shard_ranks: Count | None = None
    """fsdp: cut the model among groups of so many ranks (of one machine, say), which are replicas of each other; null:
    among all ranks. Less traffic between groups, more memory."""
    keep_whole_below: Natural = 100_000
    """zero3: weights of at most so many elements (norms, small adapters) stay whole on every rank; 0 divides all: less
    memory, more and smaller messages."""
    offload_optimizer: bool = False
    """zero1, zero2, zero3 on GPUs: float32 masters and optimizer state are in main memory, and CPUs take the step."""
    offload_parameters: bool = False
    """fsdp, zero3 on GPUs: each rank's part of the weights is in main memory while it is not used. fsdp: gradients and
    optimizer state as well, and CPUs take the step."""


@dataclass(slots=True, kw_only=True)
class EvalConfig:
    """Validation during training, and the test at its end."""

    every: Count | None = None
    """Optimizer steps between validations; null: about ten over the run."""
    generate_rows: Natural = 0
    """Validation rows that are answered and scored at each validation; 0: loss only."""
    metric: str = "loss"
    """Choose the best checkpoint by this validation figure: ``loss``, ``exact_match``, ``accuracy``, ..."""
    patience: Count | None = None
    """Stop after this many validations without an improvement of ``eval.metric``; null: never."""
    min_improvement: NonNegative = 0.0
    """What counts as an improvement."""
    batch_tokens: Count = 4096
    """Most tokens (padding included) in one batch of generation."""
    baselines: list[BaselineName] = field(default_factory=lambda: list[BaselineName](["zero_shot"]))
    """Measured on the same test rows before training."""
    max_loss: Positive | None = None
    """Gate: the run fails when the best validation loss is above this."""


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """When the state of training is published."""

    every: Count | None = None
    """Optimizer steps between checkpoints; null: at each validation."""
    keep: Count = 2
    """Newest verified checkpoints to keep besides the best one."""
    asynchronous: bool = True
    """Write behind the training, from a copy in host memory (12 bytes per trained parameter, divided among the ranks of
    fsdp and zero); false: the training waits."""


@dataclass(slots=True, kw_only=True)
class GuardConfig:
    """What counts as a fault of training, and what is done then. A step with a non-finite loss or gradient is never
    taken, by any rank."""

    nonfinite_action: Literal["stop", "skip", "rollback"] = "stop"
    """A step with a non-finite loss or gradient: ``stop`` the run, ``skip`` its data, or ``rollback`` to the last good
    checkpoint and pass over all data since then."""

    spike_factor: NonNegative = 4.0
    """A loss this many times its running median is a spike; 0: off."""
    spike_window: Annotated[int, Meta(ge=2)] = 32
    """Steps in the running median."""
    spike_action: Literal["warn", "stop", "skip", "rollback"] = "warn"
    """Print and count a spike, ``stop`` the run after a checkpoint; or do not take its step and ``skip`` its data or
    ``rollback``, as above."""
    max_faults: Natural = 10
    """Steps of a run that may be skipped or rolled back; one more stops it."""
    max_faults_in_row: Natural = 3
    """Such steps one directly after the other."""
    hang_timeout: NonNegative = 600.0
    """Seconds without progress in a training step, or without a sign of life of a rank anywhere, after which the stacks
    of all ranks are written to their logs and the run ends as one to be continued; 0: never."""


@dataclass(slots=True, kw_only=True)
class ExportConfig:
    """What is made of the trained weights."""

    adapter: bool = True
    """LoRA: write ``export/adapter``."""
    merged: bool = True
    """Write ``export/merged``: a full model that needs neither peft nor this project."""
    max_shard_gb: Positive = 5.0
    """Largest weight file, in 10^9 bytes."""

    @property
    def nothing(self) -> bool:
        """Neither: figures alone are wanted."""
        return not self.adapter and not self.merged


@dataclass(slots=True, kw_only=True)
class Config:
    """The whole config, one field per section."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cost: CostConfig = field(default_factory=CostConfig)
