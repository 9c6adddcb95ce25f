"""How commands start and end, on the cheapest of them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest

from tests.cli.commands import ROOT, SMOKE, ended

VERBS = sorted(
  file.stem
  for file in (ROOT / "aquila_jax" / "cli").glob("*.py")
  if re.search(
    r"^  app\.run(_with_name)?\(main\)$",
    file.read_text(encoding="utf-8"),
    re.MULTILINE,
  )
)


def test_there_are_fourteen_verbs():
  assert VERBS == [
    "compare_hf",
    "count",
    "efficient_scale",
    "evaluate",
    "export_hf",
    "fetch_model",
    "generate",
    "import_hf",
    "inspect_routing",
    "plan",
    "prepare_data",
    "scale_out",
    "scale_up",
    "train",
  ]


def test_help_of_every_verb_names_its_flags_and_ends_with_0(commands):
  found = commands.run_all([(verb, "--help") for verb in VERBS])
  flags = {
    "compare_hf": "model reference text text_file continue_tokens tolerance"
    " [no]trace output",
    "count": "config stage",
    "efficient_scale": "config workdir stage [no]explain_sharding replay_step"
    " coordinator num_processes process_id join_timeout_s lost_after_s",
    "evaluate": "model data output split language text_field batch_size"
    " sequence_length max_tokens tasks num_fewshot limit include_path samples"
    " dtype",
    "export_hf": "source output dtype max_shard_size",
    "fetch_model": "output param_dtype [no]list",
    "generate": "model prompt prompts_file max_new_tokens temperature top_k"
    " top_p seed stop_token batch_size [no]json mesh",
    "import_hf": "source output param_dtype tokenizer",
    "inspect_routing": "model data text output [no]json parent split language"
    " max_tokens batch_size sequence_length dead min_count typical",
    "plan": "config stage topology kind devices tokens best output",
    "prepare_data": "config output",
    "scale_out": "config stage source sources output num_experts top_k"
    " moe_layers target method redraw redraw_units noise noise_share"
    " shared_share gate_constant scaled_kernels router sample sample_tokens"
    " optimizer seed [no]check check_file check_tokens [no]dry_run",
    "scale_up": "config stage target source output method depth layers"
    " width_map maps aki_residual split_noise optimizer tokenizer seed"
    " [no]check check_file check_tokens [no]dry_run",
    "train": "config stage workdir init_from profile_steps [no]save_optimizer"
    " [no]explain_sharding replay_step coordinator num_processes process_id"
    " join_timeout_s lost_after_s",
  }
  for verb, one in zip(VERBS, found, strict=True):
    assert (one.code, one.err) == (0, ""), verb
    assert f"python -m aquila_jax.cli.{verb} " in one.out
    listed = set(re.findall(r"^  --(\S+): ", one.out, re.MULTILINE))
    assert listed == set(flags[verb].split()), verb


def test_mistakes_on_the_command_line_are_refused(commands):
  commands.assert_refused(
    {
      "a missing flag": (
        ("train", SMOKE),
        "--workdir must be given; --help lists the flags",
      ),
      "a misspelt flag": (
        ("count", "--conifg=experiments/configs/smoke.py"),
        "--conifg is no flag; did you mean '--config'?",
      ),
      "a flag of no kind": (
        ("count", SMOKE, "--blocksize=3"),
        "--blocksize is no flag; valid: --config, --stage",
      ),
      "a stray argument": (
        ("count", SMOKE, "dense"),
        "'dense' is no flag; expected --name=value, and --help lists them",
      ),
      "a flag of another type": (
        ("generate", "--model=x", "--temperature=warm"),
        "--temperature=warm: could not convert string to float: 'warm'",
      ),
      "a seed that is too large": (
        ("generate", "--model=x", "--seed=9223372036854775808"),
        "--seed=9223372036854775808: 9223372036854775808 is not an integer in"
        " the range [0, 9223372036854775807]",
      ),
      "a workdir of no name": (
        ("train", SMOKE, "--stage=dense", "--workdir="),
        "--workdir=: expected a folder to write to",
      ),
      "an experiment in no workdir": (
        ("efficient_scale", SMOKE, "--workdir="),
        "--workdir=: expected a folder to write to",
      ),
      "a step of no run": (
        ("train", SMOKE, "--stage=dense", "--workdir=no/run")
        + ("--replay_step=3",),
        "--workdir='no/run': there is no run; --replay_step takes a step of one"
        " again",
      ),
      "no patience": (
        ("train", SMOKE, "--stage=dense", "--workdir=x", "--lost_after_s=0"),
        "--lost_after_s=0: 0.0 is not number >= 1.0",
      ),
      "a missing config": (
        ("count", "--config=experiments/configs/smok.py"),
        "--config='experiments/configs/smok.py': there is no such file; did you"
        " mean 'experiments/configs/smoke.py'?",
      ),
    }
  )


def test_fault_of_a_config_file_is_shown_whole(commands, tmp_path):
  """Not in one line: where it stands is what its author needs."""
  file = tmp_path / "faulty.py"
  file.write_text("def get_config():\n  return 1 / 0\n")
  with commands.start("count", f"--config={file}") as process:
    _, err = process.communicate()
  assert process.returncode == 1
  assert f'File "{file}", line 2, in get_config' in err
  assert err.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_reader_that_leaves_is_no_fault(commands):
  """As in `count | head -0`: the output fits a buffer or not."""
  for arguments in (("count", SMOKE), ("evaluate", "--helpfull")):
    with commands.start(*arguments) as process:
      assert process.stdout is not None
      process.stdout.close()
      process.stdout = None
      one = ended(process)
    assert one.code == 1
    assert "BrokenPipe" not in one.err


# Is told to end while it writes a directory.
_WRITER = """
import os, signal, sys
from aquila_jax.cli import app
from aquila_jax.core import model_dir

output, number = sys.argv.pop(), int(sys.argv.pop())
# What a shell starts with & does not heed it, nor what that starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
def main():
  with model_dir.new_directory(output) as partial:
    (partial / "half").write_text("")
    os.kill(os.getpid(), number)
    raise AssertionError("it goes on")
app.run(main)
"""


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
)
def test_a_command_that_is_told_to_end_leaves_nothing_half_written(
  number, tmp_path
):
  done = subprocess.run(
    [sys.executable, "-c", _WRITER, str(int(number)), str(tmp_path / "new")],
    cwd=ROOT,
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 128 + number, done.stderr
  assert done.stderr.splitlines()[-1].startswith("aquila_jax: stopped; ")
  assert list(tmp_path.iterdir()) == []
