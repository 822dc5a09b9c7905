"""Estimated stage times of a step, per layer, as NEO section 3.2 names them."""

from __future__ import annotations

import math
from typing import NamedTuple

from neo.core.graph import OpKind, Work
from neo.core.pipeline import allreduce_bytes, compile, recv_bytes, send_bytes
from neo.core.plan import StepPlan
from neo.core.request import Tier
from neo.core.specs import ModelSpec
from neo.core.timing import durations, step_seconds
from neo.core.view import SystemView
from neo.cost.interface import CostModel


def plan_seconds(view: SystemView, plan: StepPlan, cost: CostModel) -> float:
    """How long the simulator would say a plan takes: compiled, priced and timed. 0 without batches."""
    if not plan.batches:
        return 0.0
    gpu = view.pools[Tier.GPU]
    graph = compile(plan, view.model, view.limits.block_size, gpu.staging_layers)
    return float(step_seconds(graph.template, durations(graph, cost)))


_LEAST_KV = 1024  # KV tokens below which one piece serves

Chunks = tuple[tuple[int, int], ...]


class CpuCell(NamedTuple):
    """``base + n * (per_sequence + cross * kv) + per_token * kv`` for n < ``to_n``, kv < ``to_kv``."""

    base: float
    per_sequence: float
    per_token: float
    cross: float
    to_n: int
    to_kv: int

    def most_kv(self, sequences: int, seconds: float) -> float:
        """KV tokens that ``sequences`` can read in ``seconds``; infinite where this piece does not tell."""
        rate = self.per_token + self.cross * sequences
        if rate <= 0.0:
            return math.inf
        most = (seconds - self.base - sequences * self.per_sequence) / rate
        return most if most < self.to_kv else math.inf


class StageTimes:
    """Asks the cost model once per distinct question. Seconds, for one layer unless said otherwise.

    Valid for one cost model and one ``version`` of it (an attribute of models that change while running).
    """

    def __init__(self, cost: CostModel, model: ModelSpec, cpu_launch_s: float = 0.0) -> None:
        self.cost = cost
        self.model = model
        self.version = getattr(cost, "version", 0)
        self._cpu_launch_s = cpu_launch_s
        self._linear: dict[int, float] = {0: 0.0}
        self._hand_over: dict[int, float] = {0: 0.0}
        self._cells: dict[tuple[int, int], CpuCell] = {}

    def fits(self, cost: CostModel) -> bool:
        """Whether these times still hold for ``cost``."""
        return cost is self.cost and getattr(cost, "version", 0) == self.version

    def linear(self, tokens: int) -> float:
        """Tl = Tpr + Tpo of a sub-batch with that many tokens; 0 for an empty one."""
        known = self._linear.get(tokens)
        if known is None:
            work = Work(tokens)
            seconds = self.cost.seconds
            known = float(seconds(OpKind.PRE, work) + seconds(OpKind.POST, work))
            if self.model.tp > 1:
                known += float(
                    seconds(OpKind.ALLREDUCE, Work(tokens, bytes=allreduce_bytes(tokens, self.model)))
                )
            self._linear[tokens] = known
        return known

    def gpu_attention(self, chunks: Chunks, sequences: int, kv_tokens: int) -> float:
        """Tga of prefill chunks (start, length) and decodes with that many KV tokens in all."""
        if not (chunks or sequences):
            return 0.0
        tokens = sequences + sum([c[1] for c in chunks])
        return float(self.cost.seconds(OpKind.GPU_ATTN, Work(tokens, sequences, kv_tokens, 0, chunks)))

    def cpu_stage(self, sequences: int, kv_tokens: int) -> float:
        """Tca of CPU decodes, the way to the host and back included."""
        if not sequences:
            return 0.0
        over = self._hand_over.get(sequences)
        if over is None:
            seconds = self.cost.seconds
            over = self._cpu_launch_s + float(
                seconds(OpKind.SEND, Work(sequences, sequences, bytes=send_bytes(sequences, self.model)))
                + seconds(OpKind.RECV, Work(sequences, sequences, bytes=recv_bytes(sequences, self.model)))
            )
            self._hand_over[sequences] = over
        return over + float(self.cost.seconds(OpKind.CPU_ATTN, Work(sequences, sequences, kv_tokens)))

    def cpu_cell(self, sequences: int, kv_tokens: int) -> CpuCell:
        """The bilinear piece of ``cpu_stage`` around a point, as NEO interpolates its profile.

        Corners are powers of two, asked for once; for the many small questions of a greedy choice.
        """
        key = (max(sequences, 1).bit_length(), max(kv_tokens, _LEAST_KV).bit_length())
        cell = self._cells.get(key)
        if cell is None:
            n0, n1 = 1 << (key[0] - 1), 1 << key[0]
            k1 = 1 << key[1]
            k0 = k1 >> 1 if k1 > _LEAST_KV * 2 else 0
            t00, t01 = self.cpu_stage(n0, k0), self.cpu_stage(n0, k1)
            t10, t11 = self.cpu_stage(n1, k0), self.cpu_stage(n1, k1)
            cross = (t11 - t10 - t01 + t00) / ((n1 - n0) * (k1 - k0))
            per_sequence = (t10 - t00) / (n1 - n0) - cross * k0
            per_token = (t01 - t00) / (k1 - k0) - cross * n0
            base = t00 - per_sequence * n0 - per_token * k0 - cross * n0 * k0
            cell = CpuCell(base, per_sequence, per_token, cross, n1, k1)
            self._cells[key] = cell
        return cell

    def around(self, tokens: int, rows: int, sequences: int) -> float:
        """Seconds of a step outside its layers: planning, embedding, head."""
        seconds = self.cost.seconds
        total = seconds(OpKind.SCHEDULE, Work(tokens, sequences)) + seconds(OpKind.EMBED, Work(tokens))
        return float(total + (seconds(OpKind.HEAD, Work(rows, rows)) if rows else 0.0))
