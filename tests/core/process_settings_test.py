from __future__ import annotations

from typing import Any

import pytest
from jax._src.clusters import cloud_tpu_cluster

from aquila_jax.core import errors
from aquila_jax.core.process_settings import Settings, find_settings

_SLURM = {
  "SLURM_JOB_ID": "4097",
  "SLURM_STEP_NODELIST": "node[03-07,12]",
  "SLURM_NTASKS": "6",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
}
_TWO: dict[str, Any] = dict(coordinator="host:1234", num_processes=2)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  """Without what the machine of the tests may say of itself."""
  for name in (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_COORDINATOR_PORT",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "KUBERNETES_SERVICE_HOST",
    "OMPI_MCA_orte_hnp_uri",
    *_SLURM,
  ):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", False)
  return monkeypatch


def _set(environment, variables):
  for name, value in variables.items():
    environment.setenv(name, value)


def test_nothing_is_one_process():
  assert find_settings() is None
  assert find_settings(num_processes=1) is None
  assert find_settings(num_processes=1, process_id=0) is None


def test_flags_and_variables_fill_each_other_in(environment):
  expected = Settings(
    coordinator="[::1]:1234", num_processes=4, process_id=3, cluster=""
  )
  assert expected.address == ("::1", 1234)
  given: dict[str, Any] = dict(
    coordinator="[::1]:1234", num_processes=4, process_id=3
  )
  assert find_settings(**given) == expected
  environment.setenv("JAX_COORDINATOR_ADDRESS", "[::1]:1234")
  environment.setenv("JAX_PROCESS_ID", "3")
  assert find_settings(num_processes=4) == expected
  environment.setenv("JAX_NUM_PROCESSES", "4")
  assert find_settings() == expected
  assert find_settings(**given) == expected  # said twice, and alike


@pytest.mark.parametrize(
  ("given", "variables", "message"),
  [
    (
      dict(coordinator="host:1234"),
      {},
      "--coordinator=host:1234: --num_processes (JAX_NUM_PROCESSES) and"
      " --process_id (JAX_PROCESS_ID) must be given too, since no cluster was"
      " found that says it",
    ),
    (
      dict(num_processes=2),
      {"JAX_PROCESS_ID": "1"},
      "--num_processes=2 --process_id=1: --coordinator"
      " (JAX_COORDINATOR_ADDRESS) must be given too, since no cluster was found"
      " that says it",
    ),
    (
      dict(num_processes=2),
      {"JAX_NUM_PROCESSES": "4"},
      "--num_processes=2 contradicts the environment, JAX_NUM_PROCESSES=4; give"
      " one of them",
    ),
    (
      {},
      {"JAX_PROCESS_ID": "first"},
      "JAX_PROCESS_ID=first: expected a number",
    ),
    (
      _TWO | dict(process_id=2),
      {},
      "--process_id=2: expected 0 to 1, one of --num_processes=2",
    ),
    (
      dict(process_id=1, num_processes=1),
      {},
      "--process_id=1: expected 0 to 0, one of --num_processes=1",
    ),
    (dict(num_processes=0), {}, "--num_processes=0: expected at least 1"),
    (
      _TWO | dict(process_id=0, coordinator="host"),
      {},
      "--coordinator=host: expected HOST:PORT, of process 0",
    ),
    (
      _TWO | dict(process_id=0, coordinator="host:70000"),
      {},
      "--coordinator=host:70000: expected HOST:PORT, of process 0",
    ),
  ],
)
def test_what_is_not_whole_or_contradicts_itself_is_refused(
  environment, given, variables, message
):
  _set(environment, variables)
  with pytest.raises(errors.UserError) as error:
    find_settings(**given)
  assert str(error.value) == message


def test_slurm_says_all_of_it(environment):
  _set(environment, _SLURM)
  # jax's own rule of the port: 4097 mod 4096 behind 61440.
  assert find_settings() == Settings(
    coordinator="node03:61441", num_processes=6, process_id=2, cluster="slurm"
  )
  assert find_settings(coordinator="other:99") == Settings(
    coordinator="other:99", num_processes=6, process_id=2, cluster="slurm"
  )
  assert find_settings(num_processes=1) is None
  environment.setenv("SLURM_NTASKS", "1")
  assert find_settings() is None


def test_pods_of_gke_say_all_of_it(environment):
  """Two slices of two hosts; this is the second host of the second one."""
  environment.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  pods = {
    "TPU_WORKER_HOSTNAMES": "localhost,localhost",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
  }
  _set(environment, pods)
  assert find_settings() == Settings(
    coordinator="localhost:8482",
    num_processes=4,
    process_id=3,
    cluster="gketpu",
  )


def test_a_tpu_vm_is_told_by_its_metadata(environment):
  environment.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  environment.delenv("TPU_SKIP_MDS_QUERY", raising=False)
  for name in ("ADDRESS", "NUM_SLICES", "SLICE_ID"):
    environment.delenv(f"MEGASCALE_{name}", raising=False)
  metadata = {
    "agent-worker-number": "1",
    "worker-network-endpoints": "u:1:127.0.0.1,u:2:127.0.0.2",
    "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\n",
  }
  environment.setattr(
    cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200)
  )
  assert find_settings() == Settings(
    coordinator="127.0.0.1:8482",
    num_processes=2,
    process_id=1,
    cluster="gcetpu",
  )
  metadata["worker-network-endpoints"] = "u:1:127.0.0.1"
  assert find_settings() is None  # a host on its own
  metadata["worker-network-endpoints"] = "a:b"
  with pytest.raises(errors.UserError) as error:
    find_settings()
  assert str(error.value) == (
    "jax found the cluster 'gcetpu', but not its processes (ValueError:"
    " unsupported worker-network-endpoints format: a:b); give --coordinator,"
    " --num_processes and --process_id, or --num_processes=1"
  )
