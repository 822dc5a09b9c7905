"""A policy that fails on demand: by a request's priority, so that it is as pure as policies must be."""

from __future__ import annotations

from dataclasses import replace

from neo.core.plan import StepPlan
from neo.core.request import State
from neo.core.view import SystemView
from neo.cost.interface import CostModel
from neo.policy.gpu_only import GpuOnly

RAISES, BREAKS_A_RULE, IDLES = 13, 14, 15


class Failing(GpuOnly):
    """``gpu-only``, until a request comes that it cannot stand."""

    def plan(self, view: SystemView, cost: CostModel) -> StepPlan:
        """Decide the next step, or fail."""
        plan = super().plan(view, cost)
        for request in view.requests.values():
            if request.state is not State.DECODE:
                continue
            if request.priority == RAISES:
                raise RuntimeError("thirteen is unlucky")
            if request.priority == BREAKS_A_RULE:
                first = plan.batches[0]
                return replace(
                    plan, batches=(replace(first, gpu_decode=(*first.gpu_decode, request)), *plan.batches[1:])
                )
        return plan
