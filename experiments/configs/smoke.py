"""The quickstart's four stages on a few pages of text: seconds of training.

  python -m aquila_jax.cli.efficient_scale \
    --config=experiments/configs/smoke.py --workdir=runs/smoke

For tests and first looks; run from the root of the repository, where its text
lies. What it learns means nothing.
"""

from __future__ import annotations

from ml_collections import ConfigDict

VOCAB_SIZE = 384
SEQUENCE_LENGTH = 64
BATCH_SIZE = 8


def get_config() -> ConfigDict:
  """The experiment; fields left out have the defaults of core/."""
  dense = _model(num_layers=2, embed_dim=32, mlp_dim=64, num_heads=2)
  grown = _model(num_layers=3, embed_dim=64, mlp_dim=128, num_heads=4)
  mixture = grown | dict(moe=dict(num_experts=4, top_k=2, block_size=32))
  return ConfigDict(
    dict(
      name="smoke",
      seed=0,
      data=_data(),
      pipeline=("dense", "scale_up", "scale_out", "control"),
      stages=dict(
        dense=dict(
          init=dict(kind="scratch"), model=dense, train=_train(steps=40)
        ),
        scale_up=dict(
          init=dict(
            kind="scale_up", source="dense", method="aki_pro", compare=("fpi",)
          ),
          model=grown,
          train=_train(steps=20),
        ),
        scale_out=dict(
          init=dict(kind="scale_out", source="scale_up"),
          model=mixture,
          train=_train(steps=20),
        ),
        control=dict(
          init=dict(kind="scratch"),
          model=mixture,
          train=_train(match_flops="scale_out"),
        ),
      ),
      evaluation=dict(
        split="test",
        max_tokens=2048,
        batch_size=BATCH_SIZE,
        prompts=("The river", "春天"),
        max_new_tokens=12,
      ),
    )
  )


def _model(**sizes) -> dict:
  return dict(
    vocab_size=VOCAB_SIZE,
    num_kv_heads=1,
    head_dim=16,
    context_length=SEQUENCE_LENGTH,
    rope_theta=1e4,
    tied_embeddings=True,
    compute_dtype="float32",
    **sizes,
  )


def _train(*, steps: int = 0, match_flops: str = "") -> dict:
  return dict(
    steps=steps,
    match_flops=match_flops,
    batch_size=BATCH_SIZE,
    sequence_length=SEQUENCE_LENGTH,
    optimizer=dict(learning_rate=3e-3, warmup_steps=5),
    checkpoint=dict(every_steps=20, every_seconds=0.0),
    log_every=5,
    evaluate_every=10,
    evaluate_tokens=1024,
  )


def _data() -> dict:
  return dict(
    sources=dict(
      en=dict(
        path="experiments/data/smoke/en.txt",
        language="en",
        txt_documents="paragraph",
        licence="Apache-2.0",
      ),
      zh=dict(
        path="experiments/data/smoke/zh.txt",
        language="zh",
        txt_documents="paragraph",
        licence="Apache-2.0",
      ),
    ),
    tokenizer=dict(vocab_size=VOCAB_SIZE),
    # A paragraph is a document; a small share of so few would be empty.
    validation_share=0.1,
    test_share=0.1,
    cleaning=dict(min_characters=16),
  )
