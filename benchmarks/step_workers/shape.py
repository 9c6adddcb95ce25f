"""The model and batch that all sides train. Standard library only."""

from __future__ import annotations

VOCAB_SIZE = 8192
WIDTH = 256
LAYERS = 4
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 32
EXPERTS, TOP_K, EXPERT_WIDTH = 8, 2, 1024
DENSE_WIDTH = 2048
CAPACITY_FACTOR = 1.25
BATCH, TOKENS = 8, 256  # sequences a step, and the tokens of each
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.1, 1.0
BETAS, EPSILON = (0.9, 0.95), 1e-8
