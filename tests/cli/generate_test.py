from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from aquila_jax.generation.generate import generate, text_model
from aquila_jax.generation.sampling import Sampling
from tests import brief
from tests.cli import tiny
from tests.cli.commands import succeeded

PROMPT = "The river"


def test_it_writes_the_text_of_the_library(commands, dense):
  command = ("generate", f"--model={dense}", "--max_new_tokens=16")
  greedy, sampled = map(
    succeeded,
    commands.run_all(
      [
        (*command, f"--prompt={PROMPT}", "--temperature=0"),
        (*command, "--seed=3", "--temperature=0.7", "--top_p=0.9"),
      ]
    ),
  )
  model = text_model(tiny.load(dense))

  def text(prompt: str, **options) -> str:
    sampling = Sampling(max_new_tokens=16, **options)
    (found,) = generate(model, [prompt], sampling=sampling)
    assert found.text
    return f"{prompt}{found.text}\n"

  assert greedy.out == text(PROMPT, temperature=0.0)
  assert sampled.out == text("", temperature=0.7, top_p=0.9, seed=3)
  rates = (
    r"prefill: \d+ tokens in \d+ ms; decode: \d+ tokens at [\d.]+ tokens/s;"
  )
  assert re.fullmatch(rates + r" [\d.]+ s to compile, before\n", greedy.err)


def test_a_model_over_several_devices_says_the_same(commands, dense):
  command = ("generate", f"--model={dense}", "--max_new_tokens=16")
  greedy = (*command, f"--prompt={PROMPT}", "--temperature=0")
  several = commands.with_environment(XLA_FLAGS=brief.with_devices(4))
  expected, *found = map(
    succeeded,
    several.run_all(
      [
        greedy,
        (*greedy, "--mesh=fsdp=2,data=2"),
        (*greedy, "--mesh=sequence=2"),
      ]
    ),
  )
  assert [one.out for one in found] == [expected.out] * 2
  several.assert_refused(
    {
      "too many devices": (
        (*greedy, "--mesh=tensor=8"),
        "--mesh=tensor=8: needs 8 devices; there are 4",
      ),
      "no such axis": (
        (*greedy, "--mesh=tensors=2"),
        "--mesh=tensors=2: mesh.tensors=2 is not a field of mesh; did you mean"
        " 'tensor'?",
      ),
      "no size": (
        (*greedy, "--mesh=tensor"),
        "--mesh=tensor: expected axes as in tensor=4",
      ),
      "an axis that does not divide the model": (
        (*greedy, "--mesh=fsdp=3"),
        "config.mesh.fsdp=3 does not divide model.embed_dim=32; nearest sizes"
        " that do: 2 or 4",
      ),
    }
  )


def test_several_prompts_give_what_the_library_gives(commands, dense, tmp_path):
  model = text_model(tiny.load(dense))
  prompts = ["The river", "a", '{"b']
  lines = tmp_path / "prompts.jsonl"
  lines.write_text("\n".join(json.dumps({"prompt": p}) for p in prompts) + "\n")
  options: dict[str, Any] = dict(
    max_new_tokens=8, temperature=0.9, top_k=20, top_p=0.95
  )
  sampling = Sampling(**options, stop_tokens=())
  (free, *_) = generate(model, prompts, sampling=sampling)
  stops = (free.tokens[4], 7)
  sampling = dataclasses.replace(sampling, stop_tokens=stops)
  expected = generate(model, prompts, sampling=sampling)
  assert expected[0].ended_by == "stop"

  command = (
    "generate",
    f"--model={dense}",
    *(f"--{name}={value}" for name, value in options.items()),
    f"--stop_token={model.tokenizer.id_to_token(stops[0])}",
    "--stop_token=7",
  )
  as_json, plain = map(
    succeeded,
    commands.run_all(
      [
        # Two batches: 2 prompts and 1.
        (*command, f"--prompts_file={lines}", "--json", "--batch_size=2"),
        (*command, *(f"--prompt={prompt}" for prompt in prompts)),
      ]
    ),
  )
  assert [json.loads(line) for line in as_json.out.splitlines()] == [
    dict(
      prompt=prompt,
      text=one.text,
      tokens=list(one.tokens),
      ended_by=one.ended_by,
    )
    for prompt, one in zip(prompts, expected, strict=True)
  ]
  texts = [p + one.text for p, one in zip(prompts, expected, strict=True)]
  assert plain.out == "\n\n".join(texts) + "\n"


def test_mistakes_are_refused(commands, dense, tmp_path):
  lines = tmp_path / "bad.jsonl"
  lines.write_text('{"prompt": "a"}\n\n{"prompt": 3}\n')
  wrong = dense.parent / "dens"
  model = f"--model={dense}"
  long = "word " * 100
  tokens = len(text_model(tiny.load(dense)).tokenizer.encode(long).ids)
  commands.assert_refused(
    {
      "a wrong path": (
        ("generate", f"--model={wrong}"),
        f"--model={str(wrong)!r}: there is no such directory; did you mean"
        f" {str(dense)!r}?",
      ),
      "a temperature that is no number": (
        ("generate", model, "--temperature=nan"),
        "temperature=nan: need >= 0",
      ),
      "a stop token that is none": (
        ("generate", model, "--stop_token=7", "--stop_token=<nothing>"),
        "--stop_token='<nothing>': is no token of the model; expected an id"
        f" below {tiny.load(dense).config.vocab_size}, or the text of a token",
      ),
      "two sources of prompts": (
        ("generate", model, "--prompt=a", f"--prompts_file={lines}"),
        "--prompt and --prompts_file are both given; expected one of them",
      ),
      "a line without a prompt": (
        ("generate", model, f"--prompts_file={lines}"),
        f'--prompts_file={str(lines)!r}: line 3: expected {{"prompt": a text}}',
      ),
      "a prompt that fills the context": (
        ("generate", model, f"--prompt={long}"),
        f"prompt={long[:37] + '...'!r}: has {tokens} tokens; expected fewer"
        " than the model's context_length=64",
      ),
    }
  )
