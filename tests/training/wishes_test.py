from __future__ import annotations

import pytest

from aquila_jax.core import processes
from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.training.wishes import Agreement, Wishes

_NOTHING = Wishes(stop=None, save=False)


@pytest.fixture
def agreement():
  return Agreement(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


def test_a_process_on_its_own_has_its_wishes_at_once(agreement):
  for wishes in (_NOTHING, Wishes(stop=15, save=False), Wishes(None, True)):
    assert agreement.reached(wishes, at_the_end=False) is wishes


def test_several_have_them_two_steps_later_and_the_last_ones_at_the_end(
  agreement, monkeypatch
):
  monkeypatch.setattr(processes, "are_several", lambda: True)
  told = [
    Wishes(stop=None, save=True),
    _NOTHING,
    Wishes(stop=15, save=False),
    _NOTHING,
  ]
  found = [agreement.reached(wishes, at_the_end=False) for wishes in told]
  assert found == [_NOTHING, _NOTHING, told[0], _NOTHING]
  end = agreement.reached(Wishes(stop=2, save=True), at_the_end=True)
  assert end == Wishes(stop=15, save=True)
  assert agreement.reached(_NOTHING, at_the_end=True) == _NOTHING
