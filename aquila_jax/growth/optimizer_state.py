"""Adam's moments grow by the maps of the parameters, with other powers.

Let a growth keep the function, with counts C. A target parameter W' then has
the gradient of its source divided by the counts of the axes that it *writes*:
C_j equal outputs share the gradient of one. (Along the axes it reads nothing is
divided: an input's copy has the same value, and the output the same gradient.)
So the moments of the gradient are, per leaf,

  mu' = mu / C_write        nu' = nu / C_write^2

copied along all axes, and the step count stays. Derived for FPI; a growth that
changes the function takes the same rule as the nearest guess. A plain AdamW
step does not commute with growth even so, since it forgets the factor 1/C_read
of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable

from aquila_jax.core.moments import AdamMoments
from aquila_jax.core.types import Params
from aquila_jax.growth.axis_map import Powers

FIRST_MOMENT = Powers(reads=0, writes=1)
SECOND_MOMENT = Powers(reads=0, writes=2)


def grow_moments(
  moments: AdamMoments, grow: Callable[[Params, Powers], Params]
) -> AdamMoments:
  """The moments of a grown model.

  Args:
    moments: of the source.
    grow: grows a tree that is shaped as the parameters.

  Returns:
    Moments shaped as the grown parameters; the step count goes on.
  """
  return AdamMoments(
    count=moments.count,
    mu=grow(moments.mu, FIRST_MOMENT),
    nu=grow(moments.nu, SECOND_MOMENT),
  )
