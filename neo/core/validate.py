"""validate.check: every invariant of a plan, in one place, for simulator, engine and tests alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from neo.core.errors import PlanError
from neo.core.growth import growing
from neo.core.plan import EvictMode, KVMove, MoveOrder, StepPlan, SubBatch, relay_rows
from neo.core.request import Request, State, Tier
from neo.core.view import SystemView

RULES: dict[str, str] = {
    "batches": "0, 1 or 2 sub-batches, none empty; with two, the second holds only CPU decodes",
    "known": "a plan names only live requests of this scheduler",
    "roles": "a request has at most one role per step",
    "state": "decode roles are for requests in DECODE, chunks for WAITING or PREFILL",
    "chunk": "a chunk starts at what is computed, has at least one token and ends within the known tokens",
    "residency": "attention on a tier reads a layer only if its KV is there or its move is ordered before",
    "token-budget": "tokens of a step stay within limits.max_batch_tokens",
    "seq-budget": "requests of a step, relayed ones aside, stay within limits.max_seqs",
    "gpu-blocks": "GPU layer-blocks hold at the peak inside the step, moves in flight included",
    "cpu-blocks": "CPU layer-blocks hold at the peak inside the step; swap-ins free theirs at its end",
    "relay": "relayed decodes run in a sequential step without other CPU decodes, all within a token "
    "together, in at most limits.relay_rows rows; such a request has no other role and its KV stays",
    "staging": "KV on its way fits the staging buffers: those set aside, or the plan's ring",
    "moves": "a move concerns KV that exists, on the other tier; a layer moves once per request and step",
    "evict": "only requests with KV and without another role are evicted; swapping out needs KV on the GPU",
    "preemption-bound": "no request is preempted more than limits.max_preemptions times",
    "reject": "only waiting requests are rejected, with a reason",
    "progress": "some request advances in every non-idle step",
    "repeat": "only a decode-only plan without moves, evictions and rejections may repeat",
}


def check(view: SystemView, plan: StepPlan) -> None:
    """Raise PlanError, naming rule, request and numbers, if ``plan`` breaks an invariant in ``view``."""
    _check_types(plan)
    if len(plan.batches) == 1 and not (plan.moves or plan.evict or plan.reject):
        batch = plan.batches[0]
        others = batch.cpu_decode or batch.stream_decode or batch.relay_decode
        if batch.gpu_decode is view.gpu_decodes and not others:
            _check_plain(view, plan, batch)
            return
    _check_batches(plan)
    _check_roles(view, plan)
    moved = _check_moves(view, plan)
    for batch in plan.batches:
        _check_chunks(batch)
        _check_residency(view, batch, moved)
    _check_relay(view, plan)
    _check_budgets(view, plan)
    _check_evictions(view, plan)
    _check_blocks(view, plan, moved)
    _check_repeat(plan)


def _check_types(plan: StepPlan) -> None:
    """Tuples: a generator would be empty the second time somebody looks. Integers: 50.0 indexes nothing."""
    parts = [type(plan.batches), type(plan.moves), type(plan.evict), type(plan.reject)]
    for b in plan.batches:
        parts += [type(b.prefill), type(b.gpu_decode), type(b.cpu_decode), type(b.stream_decode)]
        parts.append(type(b.relay_decode))
    if parts.count(tuple) != len(parts):
        other = next(p for p in parts if p is not tuple)
        raise TypeError(f"{other.__name__} instead of a tuple")
    if type(plan.why) is not str:
        raise TypeError("why is a text")
    if type(plan.repeat) is not int:
        raise PlanError("repeat", f"repeat is {plan.repeat!r}, not a whole number")
    if type(plan.ring) is not int:
        raise PlanError("staging", f"a ring of {plan.ring!r} buffers, not a whole number")
    for b in plan.batches:
        for c in b.prefill:
            if type(c.start) is not int or type(c.length) is not int:
                raise PlanError(
                    "chunk", f"start {c.start!r}, length {c.length!r}: not whole numbers", c.request.id
                )


def _check_plain(view: SystemView, plan: StepPlan, batch: SubBatch) -> None:
    """The common case, all GPU decodes by the view's own tuple and perhaps prefill: same rules, less work."""
    chunks, decodes = batch.prefill, batch.gpu_decode
    if not decodes and not chunks:
        raise PlanError("batches", "sub-batch 0 is empty")
    _check_budgets(view, plan)
    if chunks:
        requests = [c.request for c in chunks]
        _check_known(view, requests)
        _check_unique(requests)
        _check_chunks(batch)
        _check_residency(view, SubBatch(chunks), {})
        _check_blocks(view, plan, {})
        if plan.repeat:
            _check_repeat(plan)
        return
    gpu = view.pools[Tier.GPU]
    need = growing(view, decodes) * view.model.layers
    if need > gpu.total - gpu.used or plan.repeat < 0:
        _check_blocks(view, plan, {})
        _check_repeat(plan)


def _check_batches(plan: StepPlan) -> None:
    if len(plan.batches) > 2:
        raise PlanError("batches", f"{len(plan.batches)} sub-batches, at most 2 are possible")
    for i, batch in enumerate(plan.batches):
        if not (batch.sequences or batch.relay_decode):
            raise PlanError("batches", f"sub-batch {i} is empty")
    if len(plan.batches) == 2:
        second = plan.batches[1]
        if second.prefill or second.gpu_decode or second.stream_decode:
            raise PlanError(
                "batches", "sub-batch 1 may hold only CPU decodes: GPU attention runs for sub-batch 0 alone"
            )
    if not plan.batches and (plan.moves or plan.evict):
        raise PlanError("progress", "the step moves or evicts KV but advances no request")


def _check_known(view: SystemView, requests: Iterable[Request]) -> None:
    live = view.requests
    for r in requests:
        if live.get(r.id) is not r:
            raise PlanError("known", "not a live request of this scheduler", r.id)


def _check_unique(requests: Sequence[Request]) -> None:
    if len({r.id for r in requests}) == len(requests):
        return
    seen: set[str] = set()
    for r in requests:
        if r.id in seen:
            raise PlanError("roles", "named twice in one step", r.id)
        seen.add(r.id)


def _check_roles(view: SystemView, plan: StepPlan) -> None:
    actors = [r for b in plan.batches for r in (*(c.request for c in b.prefill), *b.decodes, *b.relay_decode)]
    others = [e.request for e in plan.evict] + [x.request for x in plan.reject]
    _check_known(view, actors)
    _check_known(view, others)
    _check_known(view, [m.request for m in plan.moves])
    _check_unique(actors + others)
    for x in plan.reject:
        if x.request.state is not State.WAITING:
            raise PlanError(
                "reject", f"it is in {x.request.state.name}, only waiting requests are rejected", x.request.id
            )
        if not x.reason:
            raise PlanError("reject", "no reason given", x.request.id)


def _check_chunks(batch: SubBatch) -> None:
    for c in batch.prefill:
        r = c.request
        if r.state is not State.WAITING and r.state is not State.PREFILL:
            raise PlanError("state", f"a prefill chunk for a request in {r.state.name}", r.id)
        if c.start != r.computed:
            raise PlanError("chunk", f"starts at token {c.start}, but {r.computed} tokens are computed", r.id)
        if not 1 <= c.length <= r.remaining_prefill:
            raise PlanError("chunk", f"{c.length} tokens, but {r.remaining_prefill} remain", r.id)


def _check_moves(view: SystemView, plan: StepPlan) -> dict[str, int]:
    """Returns, for every request with a move ordered before use, its host layers at the time of use."""
    layers = view.model.layers
    if not plan.moves:
        return {}
    seen: dict[str, tuple[int, KVMove]] = {}  # layers moved so far, and the first move
    gone = {e.request.id for e in plan.evict}
    streamed = {r.id for b in plan.batches for r in b.stream_decode}
    prefixed = {c.request.id for b in plan.batches for c in b.prefill if c.dst is Tier.CPU}
    on_gpu = streamed | {r.id for b in plan.batches for r in b.gpu_decode}
    for m in plan.moves:
        r = m.request
        start, stop = m.layers or (0, layers)
        if type(start) is not int or type(stop) is not int:
            raise PlanError("moves", f"layers {start!r}..{stop!r}: not whole numbers", r.id)
        if not 0 <= start < stop <= layers:
            raise PlanError("moves", f"layers {start}..{stop} of a model with {layers}", r.id)
        mask = ((1 << (stop - start)) - 1) << start
        before, first = seen.get(r.id, (0, m))
        if before & mask or r.id in gone:
            raise PlanError("moves", "moved twice, or moved and evicted", r.id)
        if m.dst is not first.dst or m.order is not first.order:
            raise PlanError("moves", "its layers move to two tiers, or in two orders, in one step", r.id)
        seen[r.id] = (before | mask, first)
        if r.computed == 0:
            raise PlanError("moves", "it has no KV", r.id)
        elsewhere = r.host_layers & mask if m.dst is Tier.CPU else ~r.host_layers & mask
        if elsewhere:
            raise PlanError(
                "moves", f"{elsewhere.bit_count()} of layers {start}..{stop} are on the {m.dst} already", r.id
            )
        if m.order is MoveOrder.AFTER and (m.dst is Tier.GPU or r.id not in on_gpu):
            raise PlanError(
                "moves", "only KV of a request that decodes on the GPU in this step can leave behind it", r.id
            )
        if m.order is MoveOrder.BEFORE and m.dst is Tier.CPU and r.id in streamed | prefixed:
            hint = ": order AFTER" if r.id in streamed else ""
            raise PlanError("moves", f"KV that leaves ahead of a step cannot be streamed in it{hint}", r.id)
    return plan.host_layers_at_use(layers)


def _check_residency(view: SystemView, batch: SubBatch, moved: dict[str, int]) -> None:
    everything = (1 << view.model.layers) - 1
    wanted = (
        (batch.gpu_decode, 0, "GPU attention"),
        (batch.cpu_decode, everything, "CPU attention"),
        (batch.relay_decode, everything, "CPU attention"),
    )
    for decodes, mask, what in wanted:
        if decodes is view.gpu_decodes or decodes is view.cpu_decodes:
            own = 0 if decodes is view.gpu_decodes else everything
            if own == mask and not moved:
                continue
        for r in decodes:
            if r.state is not State.DECODE:
                raise PlanError("state", f"a decode role for a request in {r.state.name}", r.id)
            at_use = moved.get(r.id, r.host_layers) if moved else r.host_layers
            if at_use != mask:
                raise PlanError(
                    "residency",
                    f"{what}, but {at_use.bit_count()} of {view.model.layers} layers are on the CPU",
                    r.id,
                )
    for r in batch.stream_decode:
        if r.state is not State.DECODE:
            raise PlanError("state", f"a decode role for a request in {r.state.name}", r.id)
        if not moved.get(r.id, r.host_layers):
            raise PlanError("residency", "nothing to stream: all its KV is on the GPU", r.id)
    for c in batch.prefill:
        mask = everything if c.dst is Tier.CPU else 0
        if c.start and moved.get(c.request.id, c.request.host_layers) != mask:
            raise PlanError(
                "residency", f"a chunk for the {c.dst}, but what is computed is elsewhere", c.request.id
            )


def _check_relay(view: SystemView, plan: StepPlan) -> None:
    relayed = [r for b in plan.batches for r in b.relay_decode]
    if not (relayed or view.relaying):
        return
    within = sum([r.relay_layers > 0 for r in relayed])
    for r in (*(r for b in plan.batches for r in b.decodes), *(m.request for m in plan.moves)):
        if r.relay_layers:
            raise PlanError("relay", f"it is within a token, {r.relay_layers} layers on", r.id)
    if not relayed:
        return
    if len(plan.batches) > 1:
        raise PlanError(
            "relay", "relayed decodes go in a sequential step, not in two sub-batches", relayed[0].id
        )
    if plan.batches[0].cpu_decode:
        raise PlanError("relay", "relayed decodes beside other CPU decodes", relayed[0].id)
    gone = {e.request.id for e in plan.evict if e.request.relay_layers}
    if within != view.relaying - len(gone):
        named = gone | {r.id for r in relayed}
        left = next(r.id for r in view.cpu_decodes if r.relay_layers and r.id not in named)
        raise PlanError(
            "relay", f"it is left behind: {within} of {view.relaying} within a token go on, not all", left
        )
    if (rows := relay_rows(relayed)) > view.limits.relay_rows:
        raise PlanError("relay", f"{rows} rows, limits.relay_rows is {view.limits.relay_rows}")
    going = {r.id for r in relayed}
    if moving := next((m.request.id for m in plan.moves if m.request.id in going), None):
        raise PlanError("relay", "KV of relayed decodes cannot move", moving)


def _check_budgets(view: SystemView, plan: StepPlan) -> None:
    tokens = sum([b.tokens for b in plan.batches])
    if tokens > view.limits.max_batch_tokens:
        raise PlanError(
            "token-budget", f"{tokens} tokens, max_batch_tokens is {view.limits.max_batch_tokens}"
        )
    sequences = sum([b.sequences for b in plan.batches])
    if sequences > view.limits.max_seqs:
        raise PlanError("seq-budget", f"{sequences} requests, max_seqs is {view.limits.max_seqs}")


def _check_evictions(view: SystemView, plan: StepPlan) -> None:
    everything = (1 << view.model.layers) - 1
    for e in plan.evict:
        r = e.request
        if r.computed == 0:
            raise PlanError("evict", "it holds no KV", r.id)
        if e.mode is EvictMode.SWAP and r.host_layers == everything:
            raise PlanError("evict", "its KV is on the CPU already", r.id)
        if r.preemptions >= view.limits.max_preemptions:
            raise PlanError("preemption-bound", f"preempted {r.preemptions} times already", r.id)


def _check_blocks(view: SystemView, plan: StepPlan, moved: dict[str, int]) -> None:
    layers = view.model.layers
    gpu, cpu = view.pools[Tier.GPU], view.pools[Tier.CPU]
    need = {Tier.GPU: 0, Tier.CPU: 0}
    staged = split = 0
    for batch in plan.batches:
        need[Tier.GPU] += growing(view, batch.gpu_decode) * layers
        if batch.cpu_decode:
            need[Tier.CPU] += growing(view, batch.cpu_decode) * layers
        if batch.relay_decode:
            need[Tier.CPU] += growing(view, [r for r in batch.relay_decode if not r.relay_layers]) * layers
        for r in batch.stream_decode:
            on_host = moved.get(r.id, r.host_layers).bit_count()
            if r.computed % view.limits.block_size == 0:
                need[Tier.CPU] += on_host
                need[Tier.GPU] += layers - on_host
                split += layers - on_host
            staged += view.layer_blocks(r.computed + 1) // layers
        for c in batch.prefill:
            need[c.dst] += view.growth(c.request, c.length)
            if c.dst is Tier.CPU:
                staged += view.layer_blocks(c.start + c.length) // layers
    ring = _check_ring(view, plan, staged)
    if not plan.ring and staged > gpu.staging_blocks:
        raise PlanError(
            "staging",
            f"{staged} blocks pass through the staging buffers, which have {gpu.staging_blocks}"
            + ("" if gpu.staging_layers else " (the policy declares no staging_layers)"),
        )
    arriving, leaving, dropped = _moving_blocks(view, plan)
    room = gpu.free + dropped[Tier.GPU] - ring
    if room < 0:
        raise PlanError(
            "staging",
            f"a ring of {plan.ring} for {staged} blocks needs {ring} layer-blocks, {room + ring} are free",
        )
    if arriving[Tier.GPU] > room:
        raise PlanError(
            "gpu-blocks", f"moves bring {arriving[Tier.GPU]} layer-blocks, {room} of {gpu.total} are free"
        )
    if split > room - arriving[Tier.GPU]:
        raise PlanError(
            "gpu-blocks",
            f"{split} layer-blocks of new KV in some layers only, {room} of {gpu.total} are free, "
            f"{arriving[Tier.GPU]} of them for moves",
        )
    if need[Tier.GPU] + arriving[Tier.GPU] > room + leaving:
        raise PlanError(
            "gpu-blocks",
            f"{need[Tier.GPU]} layer-blocks of new KV and {arriving[Tier.GPU]} moved in, "
            f"{room} of {gpu.total} are free and {leaving} leave before",
        )
    room = cpu.free + dropped[Tier.CPU]
    if need[Tier.CPU] + arriving[Tier.CPU] > room:
        raise PlanError(
            "cpu-blocks",
            f"{need[Tier.CPU]} layer-blocks of new KV and {arriving[Tier.CPU]} moved in, "
            f"{room} of {cpu.total} are free",
        )


def _check_ring(view: SystemView, plan: StepPlan, staged: int) -> int:
    """GPU layer-blocks that the step's own staging buffers occupy while it runs."""
    if not 0 <= plan.ring <= view.model.layers:
        raise PlanError("staging", f"a ring of {plan.ring} buffers for {view.model.layers} layers")
    return plan.ring * staged


def moved_blocks(view: SystemView, move: KVMove, advancing: bool) -> int:
    """Layer-blocks a move copies; with ``advancing``, the token of this step included (order AFTER)."""
    start, stop = move.layers or (0, view.model.layers)
    tokens = move.request.computed + (1 if advancing else 0)
    return view.layer_blocks(tokens) // view.model.layers * (stop - start)


def leaves_whole(move: KVMove, layers: int) -> bool:
    """Whether the blocks a move leaves on the GPU can hold new KV of the same step.

    Each layer's copy ends before that layer's PRE, not before an earlier one's: what leaves in all layers
    makes room for what is new in all layers, what leaves in some of them only for the next step.
    """
    return (
        move.dst is Tier.CPU
        and move.order is MoveOrder.BEFORE
        and (move.layers is None or move.layers == (0, layers))
        and move.request.host_layers == 0
    )


def _moving_blocks(view: SystemView, plan: StepPlan) -> tuple[dict[Tier, int], int, dict[Tier, int]]:
    """Layer-blocks arriving per tier, leaving the GPU in time for new KV, and dropped per tier."""
    arriving = {Tier.GPU: 0, Tier.CPU: 0}
    dropped = {Tier.GPU: 0, Tier.CPU: 0}
    leaving = 0
    for m in plan.moves:
        arriving[m.dst] += moved_blocks(view, m, m.order is MoveOrder.AFTER)
        if leaves_whole(m, view.model.layers):
            leaving += moved_blocks(view, m, False)
    for e in plan.evict:
        on_gpu = view.pools[Tier.GPU].held(e.request.id)
        if e.mode is EvictMode.SWAP:
            arriving[Tier.CPU] += on_gpu
            leaving += 0 if e.request.host_layers else on_gpu
        else:
            dropped[Tier.GPU] += on_gpu
            dropped[Tier.CPU] += view.pools[Tier.CPU].held(e.request.id)
    return arriving, leaving, dropped


def _check_repeat(plan: StepPlan) -> None:
    if plan.repeat < 0:
        raise PlanError("repeat", f"repeat is {plan.repeat}")
    if plan.repeat and (plan.moves or plan.evict or plan.reject or any(b.prefill for b in plan.batches)):
        raise PlanError("repeat", "a plan with prefill, moves, evictions or rejections cannot repeat")
    if plan.repeat and any(b.relay_decode for b in plan.batches):
        raise PlanError("repeat", "a plan with relayed decodes cannot repeat")
