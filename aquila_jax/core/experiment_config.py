"""An experiment: data, and a pipeline of stages, each (transform, train)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from aquila_jax.core import errors
from aquila_jax.core.config import require
from aquila_jax.core.model_config import ModelConfig

# The methods that growth/methods.py defines; "module:function" is one's own.
GROWTH_METHODS = (
  "fpi",
  "aki",
  "aki_pro",
  "bert2bert",
  "hypercloning",
  "lemon",
  "msg",
  "ligo",
  "random",
)
WidthMap = Literal["circular", "random"]
DepthRule = Literal[
  "interpolate", "stack", "stack_top", "solar", "llama_pro", "lemon"
]
ResidualReading = Literal["next_layer", "own_layer"]
UpcyclingMethod = Literal[
  "sparse_upcycling",
  "granular",
  "drop_upcycling",
  "noise",
  "branch_train_mix",
  "average",
  "merge_by_usage",
]
# Of these, the ones from experts to one FFN.
MERGING_METHODS = ("average", "merge_by_usage")
# Those that put together what moments do not belong to.
WITHOUT_MOMENTS = ("branch_train_mix", *MERGING_METHODS)
OptimizerRule = Literal["grow", "reset"]
GrowthRate = Literal["plain", "function_space"]
Continuation = Literal["rewarm", "restart", "keep"]


# The largest that JAX and NumPy both take.
LARGEST_SEED = 2**63 - 1


def _check_seed(seed: int) -> None:
  require(
    0 <= seed <= LARGEST_SEED, f"seed={seed}: need 0 <= seed <= {LARGEST_SEED}"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
  """Random initialisation."""

  kind: Literal["scratch"] = "scratch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """Go on from a MODEL directory of the same architecture."""

  kind: Literal["load"] = "load"
  path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LigoConfig:
  """The learning of a growth; see pipeline/learned_growth.py."""

  steps: int = 100
  # Peak; a matrix gets it over the number of source indices that a row mixes,
  # so that one number serves all widths.
  learning_rate: float = 0.1
  # Noise that tells the copies of an index apart and cancels between them, as a
  # share of the norm of a row of the operator. 0 is none.
  noise: float = 0.1
  # Sequences a step; 0 is what the stage's training holds at once, a
  # microbatch.
  batch_size: int = 0
  sequence_length: int = 0  # tokens; 0 is that of the stage's training

  def __post_init__(self):
    require(self.steps >= 1, f"steps={self.steps}: need >= 1")
    require(
      self.learning_rate > 0, f"learning_rate={self.learning_rate}: need > 0"
    )
    require(0 <= self.noise <= 1, f"noise={self.noise}: need 0 <= noise <= 1")
    for name in ("batch_size", "sequence_length"):
      value = getattr(self, name)
      require(value >= 0, f"{name}={value}: need >= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleUp:
  """Grow width and depth from a source; see growth/scale_up.py."""

  kind: Literal["scale_up"] = "scale_up"
  # A stage of this pipeline, or the path of a MODEL directory.
  source: str
  # One of GROWTH_METHODS, or "module:function" of a method of one's own.
  method: str = "aki_pro"
  width_map: WidthMap = "circular"
  # A JSON file of maps by axis name (embed, mlp, dense_mlp, kv_head, q_per_kv,
  # layer, vocab): for every target index the source index that it copies. They
  # stand in place of those that the method would choose.
  maps: str = ""
  # None: the method's own.
  depth: DepthRule | None = None
  # The source layer of every target layer, in place of a depth rule.
  layers: tuple[int, ...] = ()
  # Under AKI: whether the new outputs of the attention's and FFN's last
  # projections (and of the norms) are the next layer's or the layer's own.
  aki_residual: ResidualReading = "next_layer"
  # Noise on the shares that the readers of copies get, relative to their root
  # mean square; it sums to zero over the copies. None: the method's own.
  split_noise: float | None = None
  # Whether the target may have more tokens; new rows are the mean of all.
  vocabulary: Literal["keep", "mean"] = "keep"
  # Whether the target may have another rope_theta or rope_scaling.
  context: Literal["keep", "extend"] = "keep"
  optimizer: OptimizerRule = "grow"
  ligo: LigoConfig = LigoConfig()
  # Further methods whose loss right after growth is recorded beside.
  compare: tuple[str, ...] = ()

  def __post_init__(self):
    for field, names in (("method", (self.method,)), ("compare", self.compare)):
      for name in names:
        near = errors.nearest(name, GROWTH_METHODS)
        require(
          name in GROWTH_METHODS or ":" in name,
          f"{field}={name!r} is unknown; {near} (expected one of"
          f" {', '.join(GROWTH_METHODS)}, or module:function)",
        )
    require(
      self.method != "aki_pro"
      or (self.depth in (None, "interpolate") and not self.layers),
      f"depth={self.depth!r}: method='aki_pro' is AKI with"
      " depth='interpolate'; use method='aki' for another depth rule"
      if not self.layers
      else f"layers={self.layers}: method='aki_pro' is AKI with"
      " depth='interpolate'; use method='aki' for chosen layers",
    )
    require(
      self.depth is None or not self.layers,
      f"depth={self.depth!r} and layers={self.layers}: give one of them",
    )
    require(
      self.split_noise is None or 0 <= self.split_noise <= 10,
      f"split_noise={self.split_noise}: need 0 to 10; 0 splits evenly",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleOut:
  """Turn every FFN into experts; see growth/scale_out.py.

  How many shards an FFN is cut into follows from the target's `mlp_dim`, how a
  shared expert is filled from its `moe.shared_expert_dim`.
  """

  kind: Literal["scale_out"] = "scale_out"
  # A stage of this pipeline, or the path of a MODEL directory.
  source: str
  method: UpcyclingMethod = "sparse_upcycling"
  # Of branch_train_mix: further MODELs, whose FFNs are experts beside those of
  # the source; everything else is averaged.
  sources: tuple[str, ...] = ()
  # The share of an expert's hidden units that is drawn anew. None: the method's
  # own, 0.5 of drop_upcycling and 0 of others.
  redraw: float | None = None
  # Whether gate, up and down draw the same units anew, or each its own.
  redraw_units: Literal["together", "independent"] = "together"
  # Noise on the copies, relative to the standard deviation of a kernel, and the
  # share of the entries that get it. None: 0.1 of noise and 0 of others.
  noise: float | None = None
  noise_share: float = 0.5
  # Of a shared expert that is a copy of the whole FFN: its share of the output.
  shared_share: float = 0.5
  # Where gates do not sum to one: the constant that the experts are multiplied
  # by is measured on text, or what it would be were all gates 1 / E.
  gate_constant: Literal["measured", "uniform"] = "measured"
  # Whether constants go to the down kernel, or their cube root to all three.
  scaled_kernels: Literal["down", "all"] = "down"
  # The router's rows: drawn, or from hidden states on text: the mean of each of
  # its languages, or of each k-means cluster.
  router: Literal["normal", "domains", "clusters"] = "normal"
  # Text for what is measured.
  sample_tokens: int = 4096
  optimizer: OptimizerRule = "grow"

  def __post_init__(self):
    require(
      self.redraw is None or 0 <= self.redraw <= 1,
      f"redraw={self.redraw}: need 0 to 1, a share of the units",
    )
    require(
      self.noise is None or 0 <= self.noise <= 10,
      f"noise={self.noise}: need 0 to 10; 0 is none",
    )
    require(
      0 < self.noise_share <= 1,
      f"noise_share={self.noise_share}: need above 0 and at most 1",
    )
    require(
      0 < self.shared_share < 1,
      f"shared_share={self.shared_share}: need above 0 and below 1",
    )
    require(
      self.sample_tokens >= 2, f"sample_tokens={self.sample_tokens}: need >= 2"
    )
    require(
      bool(self.sources) == (self.method == "branch_train_mix"),
      f"sources={self.sources}: method={self.method!r} mixes"
      + (
        " several models; name at least one beside the source"
        if self.method == "branch_train_mix"
        else " no others; expected none, or method='branch_train_mix'"
      ),
    )
    require(
      self.method not in WITHOUT_MOMENTS or self.optimizer == "reset",
      f"optimizer={self.optimizer!r}: expected 'reset'; method={self.method!r}"
      " puts models together that moments do not belong to",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW and its schedule. Learning rates are peak values."""

  learning_rate: float
  schedule: Literal["cosine", "wsd", "constant"] = "cosine"
  warmup_steps: int = 0
  # The schedule of a stage that starts from weights that were trained, grown or
  # not: "rewarm" is that of a stage from scratch, "restart" leaves its warm-up
  # out and starts at the peak, "keep" goes on with one schedule over the steps
  # that the weights have had and those of the stage.
  continuation: Continuation = "rewarm"
  # "function_space" divides what Adam does to copies of a Scale-Up by their
  # number, so that the grown model learns as its source would have. See
  # training/optimizers.py for when that is exact.
  growth_lr: GrowthRate = "plain"
  # The last learning rate as a share of the peak.
  final_ratio: float = 0.1
  # Share of the steps in which "wsd" decays (linearly), at the end.
  decay_share: float = 0.2
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  # Decay leaves with fewer than two declared matrix axes (norms, biases) too.
  decay_vectors: bool = False
  # None: no clipping of the global gradient norm.
  clip_norm: float | None = 1.0
  # None: no exponential moving average of the parameters.
  ema_decay: float | None = None

  def __post_init__(self):
    require(
      self.learning_rate > 0, f"learning_rate={self.learning_rate}: need > 0"
    )
    require(
      self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps}: need >= 0"
    )
    for name in ("final_ratio", "decay_share"):
      value = getattr(self, name)
      require(0 <= value <= 1, f"{name}={value}: need 0 <= {name} <= 1")
    for name in ("beta1", "beta2", "ema_decay"):
      value = getattr(self, name)
      require(
        value is None or 0 <= value < 1, f"{name}={value}: need 0 <= {name} < 1"
      )
    require(self.epsilon > 0, f"epsilon={self.epsilon}: need > 0")
    require(
      self.weight_decay >= 0, f"weight_decay={self.weight_decay}: need >= 0"
    )
    require(
      self.clip_norm is None or self.clip_norm > 0,
      f"clip_norm={self.clip_norm}: need > 0, or None for no clipping",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveBalance:
  """A weight of the balance loss for each layer, which follows what it drops.

  Skywork-MoE (arXiv 2406.06563, section 4.2); training/balance.py. It starts at
  `LossConfig.balance`.
  """

  # Of a share d of dropped assignments the target is min(sensitivity d,
  # maximum); after a step the weight is smoothing of itself and the rest of it.
  sensitivity: float = 0.2
  maximum: float = 0.01
  smoothing: float = 0.99

  def __post_init__(self):
    for name in ("sensitivity", "maximum"):
      value = getattr(self, name)
      require(value > 0, f"{name}={value}: need > 0")
    require(
      0 <= self.smoothing < 1,
      f"smoothing={self.smoothing}: need 0 <= smoothing < 1",
    )


BalanceOver = Literal["global", "running", "micro_batch", "sequence"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """Weights of the terms beside the cross-entropy (AquilaMoE, section 3)."""

  balance: float = 0.001  # Switch load balance, mean over layers
  # The tokens of which the balance loss takes the load: the whole batch, what
  # there was of it so far, one microbatch, or one row (training/balance.py).
  # Under accumulation "global" costs a forward pass more.
  balance_over: BalanceOver = "global"
  adaptive_balance: AdaptiveBalance | None = None
  # What the selection bias of an expert moves by in a step, of a model that has
  # one (moe.selection_bias).
  bias_rate: float = 0.001
  router_z: float = 0.01  # ST-MoE router z-loss, mean over layers
  lm_z: float = 0.0  # PaLM: mean logsumexp(LM logits)^2
  lm_max_z: float = 0.0  # Baichuan2: mean max(LM logits)^2

  def __post_init__(self):
    for name in ("balance", "bias_rate", "router_z", "lm_z", "lm_max_z"):
      value = getattr(self, name)
      require(value >= 0, f"{name}={value}: need >= 0")

  @property
  def balances(self) -> bool:
    """Whether the balance loss may weigh anything."""
    return self.balance > 0 or self.adaptive_balance is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeConfig:
  """Which parameters stand still. A parameter trains if no rule freezes it."""

  # Leaves that have any of these logical axes, e.g. ("vocab",) or ("expert",).
  axes: tuple[str, ...] = ()
  # Layers start..stop-1 of the stack; (0, 0) is none.
  layers: tuple[int, int] = (0, 0)
  # Train only what the last growth added: new layers and new indices of
  # grown axes (LLaMA-Pro trains its new blocks so).
  new_only: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When to save, and what to keep."""

  every_steps: int = 1000
  # Also save when so many seconds have passed since the last one; 0 is never.
  every_seconds: float = 300.0
  keep_last: int = 2
  # Of the steps with an evaluation, the best by validation loss.
  keep_best: int = 1

  def __post_init__(self):
    require(self.every_steps >= 1, f"every_steps={self.every_steps}: need >= 1")
    require(
      self.every_seconds >= 0, f"every_seconds={self.every_seconds}: need >= 0"
    )
    require(self.keep_last >= 1, f"keep_last={self.keep_last}: need >= 1")
    require(self.keep_best >= 0, f"keep_best={self.keep_best}: need >= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeConfig:
  """What becomes of steps that get out of hand (training/spikes.py).

  "skip" changes nothing but the step's number. "rewind" goes back to the newest
  checkpoint before the step, and on with the batch after the step's.
  """

  # Of a loss, gradient or parameter that is not finite.
  nonfinite: Literal["stop", "skip", "rewind"] = "stop"
  # Of a loss or gradient norm far above those of the last steps.
  spike: Literal["ignore", "skip", "rewind"] = "ignore"
  sigmas: float = 6.0  # standard deviations above their mean
  window: int = 128  # steps
  # Steps that a checkpoint must lie before the one it is for.
  rewind_margin: int = 1
  # Steps skipped in a row, or ways back to one checkpoint, after which the run
  # stops: it will not get better by itself.
  most_in_a_row: int = 10

  def __post_init__(self):
    require(self.sigmas > 0, f"sigmas={self.sigmas}: need > 0")
    require(self.window >= 4, f"window={self.window}: need >= 4")
    require(
      self.rewind_margin >= 1, f"rewind_margin={self.rewind_margin}: need >= 1"
    )
    require(
      self.most_in_a_row >= 1, f"most_in_a_row={self.most_in_a_row}: need >= 1"
    )

  @property
  def can_skip(self) -> bool:
    return "skip" in (self.nonfinite, self.spike)

  @property
  def can_rewind(self) -> bool:
    return "rewind" in (self.nonfinite, self.spike)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """One stage of training."""

  # Optimizer steps. Exactly one of `steps` and `match_flops` is given.
  steps: int = 0
  # Train for as many FLOPs as this stage and all its ancestors took together.
  match_flops: str = ""
  batch_size: int  # sequences a step
  sequence_length: int  # T, tokens
  # Gradient accumulation: the batch in so many parts, one update.
  num_microbatches: int = 1
  # Steps in which the growth mask of the model rises by 1, until it is 1. 0 is
  # for a model without one.
  mask_steps: int = 0
  optimizer: OptimizerConfig
  loss: LossConfig = LossConfig()
  freeze: FreezeConfig = FreezeConfig()
  spikes: SpikeConfig = SpikeConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log_every: int = 10  # steps
  # Steps between validations while training; 0 is none.
  evaluate_every: int = 0
  # Tokens of validation text a language in such a validation.
  evaluate_tokens: int = 65536
  # On TPUs, whether the compiler is asked to run collectives beside compute.
  overlap_collectives: bool = True
  # Seconds without a step or a validation after which the stacks of all threads
  # are written to standard error, again and again; 0 is never.
  watchdog_s: float = 600.0

  def __post_init__(self):
    require(
      (self.steps > 0) != bool(self.match_flops),
      f"steps={self.steps} and match_flops={self.match_flops!r}: give exactly"
      " one, a positive number of steps or the name of a stage",
    )
    for name in ("batch_size", "sequence_length", "num_microbatches"):
      value = getattr(self, name)
      require(value >= 1, f"{name}={value}: need >= 1")
    require(self.mask_steps >= 0, f"mask_steps={self.mask_steps}: need >= 0")
    require(self.log_every >= 1, f"log_every={self.log_every}: need >= 1")
    require(
      self.evaluate_every >= 0,
      f"evaluate_every={self.evaluate_every}: need >= 0",
    )
    require(
      self.evaluate_tokens >= 1,
      f"evaluate_tokens={self.evaluate_tokens}: need >= 1",
    )
    require(self.watchdog_s >= 0, f"watchdog_s={self.watchdog_s}: need >= 0")
    require(
      self.batch_size % self.num_microbatches == 0,
      f"batch_size={self.batch_size} is not a multiple of"
      f" num_microbatches={self.num_microbatches}",
    )

  @property
  def tokens_per_step(self) -> int:
    return self.batch_size * self.sequence_length

  def has_load_pass(self, model: ModelConfig) -> bool:
    """Whether a step first reads all microbatches for the load alone."""
    return (
      model.moe is not None
      and self.num_microbatches > 1
      and self.loss.balances
      and self.loss.balance_over == "global"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """Where the weights come from, what they fill, and how they are trained."""

  init: Scratch | Load | ScaleUp | ScaleOut = Scratch()
  model: ModelConfig
  train: TrainConfig

  def __post_init__(self):
    require(
      self.model.growth_mask is None,
      "model.growth_mask: expected None; it is not set but comes from the model"
      " that the stage starts from",
    )
    require(
      self.train.sequence_length <= self.model.context_length,
      f"train.sequence_length={self.train.sequence_length} exceeds"
      f" model.context_length={self.model.context_length}",
    )
    require(
      not isinstance(self.init, ScaleOut) or self.model.moe is not None,
      "model.moe=None: init.kind='scale_out' fills experts; give model.moe",
    )
    if isinstance(self.init, ScaleUp):
      length = self.init.ligo.sequence_length
      require(
        length <= self.model.context_length,
        f"init.ligo.sequence_length={length} exceeds model.context_length="
        f"{self.model.context_length}",
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
  """One source of text. Its weight is relative to the other sources'."""

  # A registered corpus ("corpus:NAME"), a Hugging Face dataset
  # ("hf:NAME[:CONFIG[:SPLIT]]"), a file, a folder or a glob of .txt,
  # .jsonl[.gz|.zst] and .parquet.
  path: str
  language: str
  weight: float = 1.0
  text_field: str = "text"  # of .jsonl and .parquet rows
  # In .txt: a document is the whole file, or the text between blank lines.
  txt_documents: Literal["file", "paragraph"] = "file"
  licence: str = "not stated"
  max_bytes: int = 0  # of text taken from this source; 0 is all

  def __post_init__(self):
    require(self.weight > 0, f"weight={self.weight}: need > 0")
    require(self.max_bytes >= 0, f"max_bytes={self.max_bytes}: need >= 0")
    require(bool(self.path), "path='': name a corpus, a file or a folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """A given tokenizer.json, or a byte-level BPE trained on the text."""

  path: str = ""
  vocab_size: int = 8192  # of the BPE to train; unused with `path`
  end_of_text: str = "<|endoftext|>"  # stands between documents
  max_training_bytes: int = 8_000_000  # a language, of the BPE to train

  def __post_init__(self):
    require(
      self.vocab_size >= 257 or bool(self.path),
      f"vocab_size={self.vocab_size}: need >= 257, the bytes and end_of_text",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleaningConfig:
  """What prepare_data drops. Everything dropped is counted in the card."""

  min_characters: int = 32  # shorter documents are dropped
  exact_duplicates: bool = True
  # Estimated Jaccard similarity of character 5-gram sets from which the later
  # of two documents is dropped; 1.0 keeps near duplicates.
  near_duplicate_threshold: float = 0.8
  # A corrupt line, bad UTF-8, an empty file or shard.
  on_bad_input: Literal["skip", "refuse"] = "skip"

  def __post_init__(self):
    require(
      self.min_characters >= 0,
      f"min_characters={self.min_characters}: need >= 0",
    )
    require(
      0 < self.near_duplicate_threshold <= 1,
      f"near_duplicate_threshold={self.near_duplicate_threshold}:"
      " need 0 < threshold <= 1",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The text of an experiment."""

  # A directory of prepare_data; "" is WORKDIR/data, prepared when missing.
  prepared: str = ""
  sources: dict[str, SourceConfig]
  tokenizer: TokenizerConfig = TokenizerConfig()
  cleaning: CleaningConfig = CleaningConfig()
  # Shares of the documents held out, chosen by a hash of the text.
  validation_share: float = 0.01
  test_share: float = 0.01
  seed: int = 0  # of the order of documents and of the mixture

  def __post_init__(self):
    require(bool(self.sources), "sources={}: give at least one source")
    _check_seed(self.seed)
    for name in ("validation_share", "test_share"):
      value = getattr(self, name)
      require(0 < value < 0.5, f"{name}={value}: need 0 < {name} < 0.5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the device mesh; one of them may be -1, whatever is left."""

  data: int = -1
  fsdp: int = 1
  expert: int = 1
  sequence: int = 1
  tensor: int = 1

  def __post_init__(self):
    sizes = dataclasses.asdict(self)
    for axis, size in sizes.items():
      require(
        size >= 1 or size == -1,
        f"{axis}={size}: need >= 1, or -1 for the devices that are left",
      )
    left = [axis for axis, size in sizes.items() if size == -1]
    require(
      len(left) <= 1,
      f"{'=-1 and '.join(left)}=-1: at most one axis can have the devices that"
      " are left",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """What is measured of every stage when it is done."""

  split: Literal["validation", "test"] = "test"
  max_tokens: int = 0  # a language; 0 is the whole split
  batch_size: int = 16  # sequences
  prompts: tuple[str, ...] = ()
  max_new_tokens: int = 48
  temperature: float = 0.8
  top_p: float = 0.95

  def __post_init__(self):
    require(self.max_tokens >= 0, f"max_tokens={self.max_tokens}: need >= 0")
    require(self.batch_size >= 1, f"batch_size={self.batch_size}: need >= 1")
    require(
      self.max_new_tokens >= 1,
      f"max_new_tokens={self.max_new_tokens}: need >= 1",
    )
    require(self.temperature >= 0, f"temperature={self.temperature}: need >= 0")
    require(0 < self.top_p <= 1, f"top_p={self.top_p}: need 0 < top_p <= 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
  """A pipeline of named stages over one body of text."""

  name: str
  seed: int = 0  # of every initialisation; data.seed orders the text
  data: DataConfig
  stages: dict[str, StageConfig]
  # The stages to run, in order (a ConfigDict does not keep one).
  pipeline: tuple[str, ...]
  evaluation: EvaluationConfig = EvaluationConfig()
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    _check_seed(self.seed)
    require(bool(self.pipeline), "pipeline=(): name at least one stage")
    require(
      len(set(self.pipeline)) == len(self.pipeline),
      f"pipeline={self.pipeline}: a stage stands twice",
    )
    for i, name in enumerate(self.pipeline):
      if name not in self.stages:
        raise errors.unknown_name(f"config.pipeline[{i}]", name, self.stages)
      matched = self.stages[name].train.match_flops
      if matched and matched not in self.pipeline[:i]:
        raise errors.UserError(
          f"config.stages.{name}.train.match_flops={matched!r}: expected a"
          f" stage that stands before it in pipeline={self.pipeline}"
        )

  def stage(self, name: str) -> StageConfig:
    """The stage called `name`; "" is the only stage of the pipeline.

    Raises:
      errors.UserError: where there is no such stage, or "" is ambiguous.
    """
    if not name:
      if len(self.pipeline) != 1:
        raise errors.UserError(
          f"the config has {len(self.pipeline)} stages; choose one with"
          f" --stage={'|'.join(self.pipeline)}"
        )
      name = self.pipeline[0]
    if name not in self.stages:
      raise errors.unknown_name("--stage", name, self.stages)
    return self.stages[name]
