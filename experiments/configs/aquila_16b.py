"""AquilaDense-16B, Scale-Up of AquilaDense-7B (arXiv 2408.06567).

  python -m aquila_jax.cli.efficient_scale \
    --config=experiments/configs/aquila_16b.py --workdir=runs/aquila_16b

Width 4096 -> 5120, depth 32 -> 40, 4 -> 5 query heads in each of 8 groups.

Sizes, peak learning rate, batch and tokens are those of the paper and of its
public configs; where these contradict each other a comment has both values. Not
stated, and here as the same lab does elsewhere: AdamW's betas, weight decay,
clipping, schedule. The text is not public: prepare your own with a
vocabulary of at most 151,851 and give it as --config.data.prepared=DIR.
"""

from __future__ import annotations

from ml_collections import ConfigDict

TOKENS = 1_200_000_000_000
SEQUENCE_LENGTH = 4096
# The paper says 12M: 12 * 2^20 is a whole number of rows.
TOKENS_PER_STEP = 12 * 2**20


def get_config() -> ConfigDict:
  """One stage; fields left out have the defaults of core/."""
  return ConfigDict(
    dict(
      name="aquila_16b",
      pipeline=("aquila_16b",),
      stages=dict(
        aquila_16b=dict(
          init=dict(
            kind="scale_up",
            # A MODEL directory, as aquila_7b.py leaves it.
            source="runs/aquila_7b/stages/aquila_7b/model",
            method="aki_pro",
            # Target layer l comes from source layer floor(l * 32 / 40); the
            # paper's formula is misprinted.
            depth="interpolate",
            # Whether the last projections take the next layer's values too is
            # not said; "own_layer" is the other reading.
            aki_residual="next_layer",
          ),
          model=_model(),
          train=_train(),
        )
      ),
      data=_data(),
      # Every parameter is divided over the devices.
      mesh=dict(data=1, fsdp=-1, expert=1, tensor=1),
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
      learning_rate=4e-4,
      schedule="cosine",
      warmup_steps=1000,
      final_ratio=0.1,
      beta1=0.9,
      beta2=0.95,
      weight_decay=0.1,
      clip_norm=1.0,
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
