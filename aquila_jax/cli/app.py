"""How every command starts and ends.

Exit codes: 0 done; 1 a fault of ours or of the machine; 2 a mistake in what the
user gave, in one line; 3 training stopped on a loss that is not finite; 4 the
disk is full; 5 another process of the job is lost; 128 + n stopped by signal n
with everything saved. A process that ends because another one of its job does
takes that one's code.
"""

from __future__ import annotations

import logging as python_logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from aquila_jax.cli import config_door
from aquila_jax.core import disk, errors, process_watch
from aquila_jax.training.interruption import Interrupted

_MISSING = re.compile(r"Flag (--\w+) must have a value other than None")
_PROGRAM = "aquila_jax"
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# How an error begins that a lost process can be the cause of: the codes of
# absl::Status, of collectives and of the coordination service.
_OF_A_CONNECTION = re.compile(
  "UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED"
  "|FAILED_PRECONDITION"
)
# The job that this process is one of; it has one at most.
_jobs: list[process_watch.Watch] = []


def run_with_name(main: Callable[[str | None], None]) -> NoReturn:
  """`run` for a command that takes a name beside its flags.

  Args:
    main: the command; is given the name, or None.
  """

  def with_name(names: Sequence[str]) -> None:
    _refuse_arguments(names[1:])
    main(names[0] if names else None)

  _run(with_name)


def run(main: Callable[[], None]) -> NoReturn:
  """Parses the command line, runs `main`, and ends the process.

  Args:
    main: the command; takes its flags from absl.
  """

  def without_arguments(given: Sequence[str]) -> None:
    _refuse_arguments(given)
    main()

  _run(without_arguments)


def _refuse_arguments(given: Sequence[str]) -> None:
  if given:
    raise errors.UserError(
      f"{given[0]!r} is no flag; expected --name=value, and --help lists them"
    )


def _run(main: Callable[[Sequence[str]], None]) -> NoReturn:
  # `--config.a.b=value` is for config_door; absl gets the rest.
  arguments = config_door.take_overrides(sys.argv)
  for name in _own_flags():
    # So that --help lists it, in whichever module it is defined.
    flag = flags.FLAGS[name.removeprefix("--")]
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  try:
    try:
      app.run(
        lambda argv: _guarded(main, argv), argv=arguments, flags_parser=_parse
      )
    finally:
      sys.stdout.flush()
  except BrokenPipeError:
    # Whoever read our output has left. What is still buffered goes nowhere, or
    # Python would complain of it at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  raise AssertionError("app.run does not return")


def join_job(watch: process_watch.Watch) -> None:
  """Makes the end of this process that of its job, and the other way round."""
  _jobs.append(watch)


def leave_the_log_to_the_first() -> None:
  """In other processes only warnings are shown, with the process in front."""
  prefix = process_watch.prefix()
  if prefix:
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter(f"{prefix}%(message)s"))
    handler.addFilter(lambda record: record.levelno >= python_logging.WARNING)


def _guarded(
  main: Callable[[Sequence[str]], None], argv: Sequence[str]
) -> NoReturn:
  _show_own_log()
  sys.unraisablehook = _unless_late
  for number in (signal.SIGTERM, signal.SIGHUP):
    # So that what is half written is removed; nohup's choice stays.
    if signal.getsignal(number) is signal.SIG_DFL:
      signal.signal(number, _interrupt)
  try:
    main(argv[1:])
    _leave_job()
  except errors.UserError as error:
    _end(2, str(error))
  except errors.TrainingStopped as error:
    _end(3, str(error))
  except errors.DiskFull as error:
    _end(4, str(error))
  except Interrupted as error:
    _leave_job()  # all of them are here
    _end(error.exit_code, str(error))
  except KeyboardInterrupt as error:
    number = error.args[0] if error.args else signal.SIGINT
    _end(
      128 + number,
      "stopped; the same command goes on from the last checkpoint, or begins"
      " anew where it has none",
    )
  except Exception as error:
    full = disk.as_full(error, "a file")
    if full is None:
      _fail_in_job(error)
      raise
    _end(4, str(full))
  logging.flush()
  sys.exit(0)


def _interrupt(number: int, frame: object) -> NoReturn:
  del frame
  raise KeyboardInterrupt(number)


def _unless_late(unraisable: Any) -> None:
  """Shows an exception that nobody could catch, but for one.

  When one write of a checkpoint fails, Orbax raises it and closes its loop;
  TensorStore then says for each of the other writes that it finds it closed.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _show_own_log() -> None:
  """Plain lines of our own log on standard error, and others' warnings.

  Libraries log through absl's one logger, dozens of lines a checkpoint.
  """
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter("%(message)s"))
  handler.addFilter(_is_for_people)
  python_logging.getLogger("asyncio").addFilter(_is_no_full_disk)
  if flags.FLAGS["verbosity"].using_default_value:
    logging.set_verbosity(logging.INFO)


def _is_for_people(record: python_logging.LogRecord) -> bool:
  if record.pathname.startswith(_PACKAGE):
    return True
  if f"{os.sep}orbax{os.sep}" in record.pathname:
    # It warns of what is as it should be, and logs what it also raises.
    return record.levelno >= python_logging.ERROR and not record.exc_info
  return record.levelno >= python_logging.WARNING


def _is_no_full_disk(record: python_logging.LogRecord) -> bool:
  """Of the writes of a checkpoint that fail, Orbax raises the first."""
  error = record.exc_info[1] if record.exc_info else None
  return error is None or disk.why_full(error) is None


def _parse(argv: Sequence[str]) -> list[str]:
  """Parses by absl, with one line for a mistake and 0 for --help."""
  try:
    return flags.FLAGS(list(argv))
  except flags.UnrecognizedFlagError as error:
    near = errors.nearest(f"--{error.flagname}", _own_flags())
    _end(2, f"--{error.flagname} is no flag; {near}")
  except flags.Error as error:
    _end(2, _in_one_line(error))
  except SystemExit as end:
    # absl prints the help and ends with 1.
    asked = {"--help", "-help", "--helpfull", "--helpshort", "-h", "-?"}
    raise SystemExit(0 if asked & set(argv) else end.code) from None


def _in_one_line(error: flags.Error) -> str:
  missing = _MISSING.findall(str(error))
  if missing:
    return f"{' and '.join(missing)} must be given; --help lists the flags"
  return " ".join(str(error).removeprefix("flag ").split())


def _own_flags() -> list[str]:
  """The flags of this program, without those that libraries bring."""
  own = ("aquila_jax.", sys.argv[0])  # the second is of the verb itself
  by_module = flags.FLAGS.flags_by_module_dict()
  return [
    f"--{flag.name}"
    for module, members in by_module.items()
    if module.startswith(own)
    for flag in members
  ]


def _leave_job() -> None:
  """Waits for the other processes, where this one is of several."""
  for job in _jobs:
    job.leave()
  _jobs.clear()


def _fail_in_job(error: Exception) -> None:
  """An error that nobody foresaw, in one process of several.

  Ends the process: by the verdict, where another one is lost, and else as it
  would have ended, but without waiting for the others.
  """
  if not _jobs:
    return
  text = f"{type(error).__name__}: {error}"
  if isinstance(error, jax.errors.JaxRuntimeError | ValueError):
    if _OF_A_CONNECTION.match(str(error)):
      logging.warning("is another process lost? %s", text)
      _jobs[0].await_verdict()
  traceback.print_exception(error)
  sys.stderr.flush()
  _jobs[0].fail(1, text)
  os._exit(1)


def _end(code: int, message: str) -> NoReturn:
  line = f"{_PROGRAM}: {process_watch.prefix()}{message}"
  print(line, file=sys.stderr, flush=True)
  if _jobs and code:
    # Python's own end would wait for the others, and they for it.
    sys.stdout.flush()
    _jobs[0].fail(code, message)
    os._exit(code)
  sys.exit(code)
