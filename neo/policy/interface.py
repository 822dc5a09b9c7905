"""The Policy interface: the module that policy developers write."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from neo.core.plan import StepPlan
from neo.core.view import SystemView
from neo.cost.interface import CostModel


@runtime_checkable
class Policy(Protocol):
    """Plans one step at a time.

    Pure: it reads the view, returns a plan, mutates nothing, reads no clock and draws no unseeded random
    number. Same view, same plan; so it runs unchanged in the simulator and in the engine.

    Three attributes are optional. ``staging_layers: int`` (default 0) sets aside GPU memory for that many
    layers' KV, for KV on its way to or from the host. ``relays: bool`` (default False) tells that it may plan
    relayed decodes, so that an engine prepares for them at start; it may plan them without. ``Options``, of
    the class, a dataclass, makes ``--policy-opt key=value`` available: the class is then constructed with an
    instance of it, otherwise without arguments.
    """

    def plan(self, view: SystemView, cost: CostModel) -> StepPlan:
        """Decide the next step."""
        ...
