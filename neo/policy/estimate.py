"""Estimated stage times of a step, per layer, as NEO section 3.2 names them."""

from __future__ import annotations

from neo.core.graph import OpKind, Work
from neo.core.pipeline import allreduce_bytes, recv_bytes, send_bytes
from neo.core.specs import ModelSpec
from neo.cost.interface import CostModel

Chunks = tuple[tuple[int, int], ...]


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

    def around(self, tokens: int, rows: int, sequences: int) -> float:
        """Seconds of a step outside its layers: planning, embedding, head."""
        seconds = self.cost.seconds
        total = seconds(OpKind.SCHEDULE, Work(tokens, sequences)) + seconds(OpKind.EMBED, Work(tokens))
        return float(total + (seconds(OpKind.HEAD, Work(rows, rows)) if rows else 0.0))
