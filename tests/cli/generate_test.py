from __future__ import annotations

from aquila_jax.generation.generate import generate, text_model
from aquila_jax.generation.sampling import Sampling
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


def test_mistakes_are_refused(commands, dense):
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
      "a prompt that fills the context": (
        ("generate", model, f"--prompt={long}"),
        f"prompt={long[:37] + '...'!r}: has {tokens} tokens; expected fewer"
        " than the model's context_length=64",
      ),
    }
  )
