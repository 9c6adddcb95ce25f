"""Adam's moments grow by the maps of the parameters, with other powers.

Let a growth keep the function, with counts C. A target parameter W' then has
the gradient of its source divided by the counts of the axes that it *writes*:
C_j equal outputs share the gradient of one. (Along the axes it reads nothing is
divided: an input's copy has the same value, and the output the same gradient.)
A norm scale that became f times its source has a gradient of 1 / f. So the
moments of the gradient are, per leaf,

  mu' = mu / (C_write f)        nu' = nu / (C_write f)^2

copied along all axes, and the step count stays. What is new has no gradients
behind it: its moments are zero. Derived for even copies that keep the function
(optimizer_state_test.py compares with the gradients of the grown model); a
growth that changes it, or splits a reader unevenly, takes the same rule as the
nearest guess. A plain AdamW step does not commute with growth even so, since it
forgets the factor 1 / C_read of the parameter.
"""

from __future__ import annotations

from aquila_jax.growth.axis_map import Powers

FIRST_MOMENT = Powers(reads=0, writes=1, norm=-1, draws=False)
SECOND_MOMENT = Powers(reads=0, writes=2, norm=-2, draws=False)
