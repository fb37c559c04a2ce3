"""The typed schema: every key of the composed configuration, its type, its unit and what its special values mean.

Free of torch and of hydra, so that a misspelt key is refused before anything heavy is imported. Where a type is a
`Literal`, the listed values are the only ones; `X | None` says that `null` is allowed. The defaults here are the ones
of the library; the YAML files under conf/ and recipes/ only choose among them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Part = dict[str, Any]
"""One choice on an axis: `_target_` names its class, every other key is an argument of that class's constructor."""


@dataclass
class ModelConfig:
    """A LLaMA of given sizes, or any Hugging Face causal language model."""

    name: str = "llama_1m"
    kind: Literal["llama", "hf"] = "llama"
    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # null: as many as attention heads
    vocab_size: int | None = None  # rows of the embedding; null: the tokenizer's size
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02  # standard deviation of the initial matrices
    tie_word_embeddings: bool = False
    path: str | None = None  # kind hf: a folder, or a name on the hub
    revision: str | None = None  # kind hf: the commit on the hub
    pretrained: bool = True  # kind hf: false takes the architecture and initialises it anew
    allow_pickle: bool = False  # kind hf: true reads weights from pytorch_model.bin where there is no safetensors
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    activation_checkpointing: bool = False  # recompute each layer in backward: less memory, about a third more compute
    loss_chunk_tokens: int = 1024  # positions whose logits exist at one time; 0: all of them
    compile: bool = False  # torch.compile


@dataclass
class DataConfig:
    """Where documents come from and how they become rows of `seq_len` tokens."""

    name: str = "shakespeare"
    source: Literal["jsonl", "text", "tokens", "glue", "chat"] = "jsonl"  # tokens: made by `lowrank data prepare`
    task: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"] | None = None  # glue
    folder: str | None = None  # glue: where a folder for each task lies, or the task's own; null: the hub
    train_rows: int | None = None  # glue: so many of the rows to train on, the same for every seed; null: all
    train: list[str] = field(default_factory=list)  # files, globs, folders or hf:// addresses; {00000..01023} expands
    validation: list[str] = field(default_factory=list)
    revision: str | None = None  # commit for hf:// addresses
    text_key: str = "text"  # jsonl, chat: the field that holds the document
    format: Literal["auto", "text", "prompt_completion", "messages"] = "auto"  # chat; auto: by the keys of each file
    loss_on: Literal["completion", "all"] = "completion"  # chat: completions or the assistant's turns, or every token
    chat_template: str | None = None  # chat: a Jinja file, or the template itself; null: the tokenizer's own
    samples: int = 0  # chat: validation prompts answered at each evaluation, greedily, into samples.jsonl
    sample_tokens: int = 64  # chat: new tokens of an answer, at most
    tokenizer: str = ""  # a SentencePiece .model, a tokenizer.json, a folder, or a name on the hub
    seq_len: int = 256  # tokens in a row
    packing: Literal["pad", "concat", "whole"] = "concat"
    """pad: one document a row, cut and padded, as the papers do; concat: end to end; whole: chat, none cut in two."""
    mask_documents: bool = False  # concat, whole: attention stays within a document
    shuffle_documents: int | Literal["all"] = 0  # together, block by block; 0: files' order; all: tokens, all of them
    repeat: bool = True  # start over when the corpus ends; false: training ends with it
    num_workers: int = 0  # tokenizing processes per rank; 0: in the training process
    validation_tokens: int | None = None  # target tokens in an evaluation; null: the whole split
    log_documents: bool = False  # write documents.csv: which update saw which document


@dataclass
class StrategyConfig:
    """A memory strategy: one choice on every axis."""

    name: str = "full"
    weights: Part | None = None  # how the matrices of linear layers are represented; null: dense
    merge: Part | None = None  # folds the layers of `weights` every so many updates; null: never
    select: list[str] = field(default_factory=list)  # patterns of the names of the matrices that `inner` serves
    subspace: Part | None = None  # null: `inner` runs on the whole matrix
    inner: Part | None = None  # the rule on the small gradient
    lift: Part | None = None
    storage: Part | None = None  # the state of `inner`, and of `rest`, in fewer bits; null: as precision.state says
    refresh: Part | None = None  # when the basis moves; null: every subspace.every updates
    feedback: Part | None = None  # what compression loses is added to the next gradient; null: it is lost
    on_refresh: Literal["keep", "reset", "rotate"] = "keep"  # the moments when the basis moves
    blocks: Part | None = None  # which of the selected tensors are trained when; null: all, always
    rest: Part = field(default_factory=dict)  # the rule for every other parameter
    repeat: Part | None = None  # updates made again while held-out rows get easier; null: none
    freeze_rest: bool = False  # train nothing but what `select` matches
    when: Literal["after_backward", "project_in_backward", "in_backward"] = "after_backward"
    basis_under_accumulation: Literal["window", "first_micro_batch"] = "window"  # project_in_backward: see README


@dataclass
class PrecisionConfig:
    """Number formats of weights, compute and optimizer state."""

    name: str = "fp32"
    compute: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"  # Lightning's name
    weights: Literal["float32", "bfloat16"] = "float32"
    state: Literal["float32", "bfloat16"] = "float32"
    rounding: Literal["nearest", "stochastic", "compensated"] = "nearest"  # of bfloat16 and int8 weights, when updated
    int8_group: int | None = None  # linear layers in 8-bit codes, so many numbers to a scale; null: as `weights`
    count_lost_updates: bool = False  # optim/lost_updates_pct in metrics.csv; with rounding=nearest rules run twice

    @property
    def formats(self) -> str:
        """Of the weights, in words."""
        return self.weights if self.int8_group is None else f"{self.weights} and int8"


@dataclass
class OptimConfig:
    """Learning rate, its schedule, decay and clipping. Steps are updates, never micro-batches."""

    lr: float = 1e-3
    schedule: Literal["cosine", "cosine_restarts", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float | None = None  # with trainer.epochs: share of all steps, in place of warmup_steps
    min_lr_ratio: float = 0.1  # of lr, reached at the last step
    cycle_steps: int | None = None  # updates from one restart to the next; null: no restarts
    restart_warmup_steps: int = 0  # updates from 0 back up to the cosine after each restart
    weight_decay: float = 0.0
    grad_clip: float | None = None  # largest global gradient norm; null: no clipping
    clip_norm_of: Literal["full", "projected"] = "full"  # projected: the norm of what reaches the inner rule


@dataclass
class TrainerConfig:
    """Length, batch and cadence of a run, and the machine it runs on."""

    steps: int = 1000  # updates
    epochs: int | None = None  # glue, chat: passes over the rows; decide steps, eval_every_steps; null: steps
    batch_size: int = 4  # rows per device and micro-batch
    total_batch_size: int | None = None  # rows per update over all devices; null: batch_size x devices
    eval_every_steps: int = 500  # 0: only at the end
    save_every_steps: int = 500  # 0: only at the end
    keep_checkpoints: int = 2  # newest ones kept
    keep_best: bool | None = None  # the weights of the best evaluation too; null: where epochs are set
    log_every_steps: int = 50  # a console line when the output is not a terminal
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"] = "auto"
    """Lightning's: how devices work together; auto: one alone, several by ddp."""
    reduce: Literal["gradients", "projected"] = "gradients"  # ddp: what is averaged over the devices, see README
    threads: int | None = None  # CPU threads; null: torch's choice

    @property
    def keeps_best(self) -> bool:
        """Whether the weights of the best evaluation are kept beside the last."""
        return self.epochs is not None if self.keep_best is None else self.keep_best


@dataclass
class LoggerConfig:
    """Where metrics go besides metrics.csv, which is always written."""

    name: Literal["csv", "tensorboard", "wandb"] = "csv"
    project: str = "lowrank_train"  # wandb
    entity: str | None = None  # wandb
    offline: bool | None = None  # wandb; null: offline when there is no key


@dataclass
class GenerateConfig:
    """What `lowrank generate` samples."""

    prompt: str = ""
    chat: bool | None = None  # the prompt is a user's message in the chat template; null: as the run was trained
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: the most probable token
    top_p: float = 0.95
    num_samples: int = 1


@dataclass
class RunConfig:
    """One invocation of the program."""

    task: Literal[
        "train", "explain", "plan", "export", "evaluate", "generate", "data_prepare", "doctor", "support", "compare",
        "card",
    ] = "train"  # fmt: skip
    run_name: str | None = None  # null: <model>-<strategy>-<data>
    output_dir: str = "runs"
    resume: str = "auto"  # auto | false | a checkpoint or run folder
    rehearse: bool | Literal["auto"] = "auto"  # every phase once before training; auto: for runs beyond an hour
    seed: int = 42
    run: str | None = None  # export, generate, evaluate: a run folder or a Hugging Face folder
    best: bool = False  # export, evaluate, generate: a run's weights of its best evaluation, not the last
    out: str | None = None  # export, data prepare, compare: the folder to write
    adapter: bool = False  # export: PEFT's adapter_config.json and adapter_model.safetensors in place of a whole model
    runs: list[str] = field(default_factory=list)  # compare, card: run folders; on the command line without runs=
    paper: str | None = None  # compare: the published table to set the runs beside, such as galore_table2
    card: str | None = None  # plan: the card to judge, such as 4090; null: all that are known
    budget_gb: float | None = None  # plan: in place of a card, what all of the process may take; GB are 10^9 bytes
    fit: bool = False  # plan: find what fits the card or the budget
    format: Literal["table", "json"] = "table"  # plan, doctor, support
    quick: bool = False  # doctor: neither torch nor a GPU nor the network is touched
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
