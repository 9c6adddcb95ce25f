"""AquilaMoE-8x16B, Scale-Out of AquilaDense-16B (arXiv 2408.06567).

  python -m aquila_jax.cli.efficient_scale \
    --config=experiments/configs/aquila_8x16b.py --workdir=runs/aquila_8x16b

104.7B parameters, 29.2B active.

Sizes, peak learning rate, batch and tokens are those of the paper and of its
public configs; where these contradict each other a comment has both values. Not
stated, and here as the same lab does elsewhere: AdamW's betas, weight decay,
clipping, schedule. The text is not public: prepare your own with a
vocabulary of at most 151,851 and give it as --config.data.prepared=DIR.
"""

from __future__ import annotations

from ml_collections import ConfigDict

TOKENS = 545_000_000_000
SEQUENCE_LENGTH = 4096
# The paper says 24M: 24 * 2^20 is a whole number of rows.
TOKENS_PER_STEP = 24 * 2**20


def get_config() -> ConfigDict:
  """One stage; fields left out have the defaults of core/."""
  return ConfigDict(
    dict(
      name="aquila_8x16b",
      pipeline=("aquila_8x16b",),
      stages=dict(
        aquila_8x16b=dict(
          init=dict(
            kind="scale_out",
            # A MODEL directory, as aquila_16b.py leaves it.
            source="runs/aquila_16b/stages/aquila_16b/model",
            method="sparse_upcycling",
          ),
          model=_model(),
          train=_train(),
        )
      ),
      data=_data(),
      # Every parameter is divided over the devices, experts 8 ways.
      mesh=dict(data=1, fsdp=-1, expert=8, tensor=1),
    )
  )


def _model() -> dict:
  return dict(
    vocab_size=151851,
    num_layers=40,
    embed_dim=5120,
    # One public config says 17920; 20480 gives the paper's 30B active.
    mlp_dim=20480,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    context_length=SEQUENCE_LENGTH,
    rope_theta=1e6,
    norm_epsilon=1e-5,
    qkv_bias=True,
    tied_embeddings=False,
    init_std=0.02,
    moe=dict(
      num_experts=8,
      top_k=2,
      # Not stated; in this order the gates sum to one and upcycling is exact.
      router_order="topk_then_softmax",
      # The paper says "variance 0.02", which would be a std of 0.1414.
      router_init_std=0.02,
    ),
    remat="full",
    param_dtype="float32",
    compute_dtype="bfloat16",
  )


def _train() -> dict:
  return dict(
    steps=TOKENS // TOKENS_PER_STEP,
    batch_size=TOKENS_PER_STEP // SEQUENCE_LENGTH,
    sequence_length=SEQUENCE_LENGTH,
    optimizer=dict(
      learning_rate=1.5e-4,
      schedule="cosine",
      warmup_steps=500,
      final_ratio=0.1,
      beta1=0.9,
      beta2=0.95,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    loss=dict(
      balance=0.001,
      # The paper's "max z-loss" has no formula. This is ST-MoE's router z-loss;
      # lm_max_z (Baichuan 2: 2e-4) and lm_z (PaLM: 1e-4) are other readings.
      router_z=0.01,
      lm_max_z=0.0,
      lm_z=0.0,
    ),
    checkpoint=dict(every_steps=1000, every_seconds=1800.0),
    log_every=10,
    evaluate_every=1000,
    evaluate_tokens=1_000_000,
  )


def _data() -> dict:
  """A stand-in, so that the config is whole: the quickstart's corpus."""
  return dict(
    prepared="",
    sources=dict(
      tencentcloud_zh=dict(path="corpus:tencentcloud_zh", language="zh"),
      tencentcloud_en=dict(path="corpus:tencentcloud_en", language="en"),
    ),
    tokenizer=dict(vocab_size=151851),
  )
