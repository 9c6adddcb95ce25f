"""EfficientScale in JAX: grow a small language model instead of training anew.

From the bottom up; a package imports from those above it only:

  core        named axes with a direction, configs, the MODEL directory, errors
  kernels     SwiGLU experts over blocks of rows, one folder a kernel
  sharding    the device mesh, and where every axis lies on it
  layers      norm, rotary, attention, feed-forward, mixture of experts
  models      the decoder, dense or mixture
  growth      index maps on axes: Scale-Up, Scale-Out, optimizer state
  data        sources, cleaning, tokenizer, token shards, packed batches
  training    the step, the loop, checkpoints, metrics
  generation  sampling with a key/value cache
  evaluation  loss and bits per byte, the report
  planning    parameter and FLOP counts
  pipeline    stages in order, resumption, the control
  cli         one entry point a verb

A token's way from the batch to the loss: data/loader.py, models/decoder_lm.py
and the layers that it names, training/losses.py, training/step.py.
"""
