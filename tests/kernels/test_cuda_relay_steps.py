"""Relayed decodes from layer to layer: the device's kernel and the host's threads, step after step."""

from __future__ import annotations

import ctypes
import gc
import random
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_cases import EPSILON, Device, attention, device
from kernel_cases import needs_library

from neo.core.request import Tier
from neo.runtime.block_tables import TierBlocks
from neo.runtime.cuda_host import HostAttention, Submitted
from neo.runtime.cuda_relay import HostRelay, Relay, layer_times
from neo.runtime.errors import EngineError
from neo.runtime.kv_memory import KVMemory
from neo.runtime.model_config import RopeConfig
from neo.runtime.rope import RotaryEmbedding
from neo.runtime.step_inputs import NOBODY, RelayRows

__all__ = ["device"]
pytestmark = needs_library

HEADS, KV_HEADS, DIM, HIDDEN, BLOCK = 4, 2, 16, 32, 16
WIDTH = (HEADS + 2 * KV_HEADS) * DIM
FIRST = 3  # rows of others that stand before those of relayed decodes


@dataclass
class Sequence:
    """A request: its KV by layer, and where it is."""

    slot: int
    lane: int = 0
    layer: int = 0  # layers behind it within the token
    length: int = 0
    k: list[torch.Tensor] = field(default_factory=list)  # by layer [tokens, kv heads, dim]
    v: list[torch.Tensor] = field(default_factory=list)


class Scene:
    """Device buffers, host memory, threads, and what float64 makes of it. Close it."""

    def __init__(self, where: Device, layers: int, lanes: int, seed: int = 0, first: int = 0) -> None:
        self.device, self.layers = where, layers
        self.random = random.Random(seed)
        self._numbers = torch.Generator().manual_seed(seed)
        target = torch.device(where.name)
        config = SimpleNamespace(layers=layers, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, hidden=HIDDEN)
        self.rotary = RotaryEmbedding(RopeConfig(), DIM, torch.float16, target)
        model: Any = SimpleNamespace(config=config, device=target, dtype=torch.float16, rotary=self.rotary)
        count = FIRST + lanes
        self.qkv, self.hidden, self.attended, self.cos, self.sin = (
            where(torch.zeros(count, width, dtype=torch.float16))
            for width in (WIDTH, HIDDEN, HEADS * DIM, DIM, DIM)
        )
        q, k, v = self.qkv.view(count, -1, DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
        rows: Any = SimpleNamespace(
            q=q, k=k, v=v, attended=self.attended, hidden=self.hidden, cos=self.cos, sin=self.sin
        )
        self.relay = Relay(model, rows, lanes)
        self.start_at(first)
        blocks = torch.full((4096, KV_HEADS, 2, DIM * BLOCK), float("nan"), dtype=torch.float16)
        self.memory = KVMemory(blocks, BLOCK)
        self.tier = TierBlocks(Tier.CPU, len(blocks), layers, 1, 1)
        self.host = HostRelay(self.relay, self.memory, self.tier, HEADS)
        self.threads = HostAttention(self.memory, self.tier, 2, None, layers)
        self.kept = torch.zeros(layers, lanes, HIDDEN, dtype=torch.float16)
        self.sent: list[torch.Tensor] = [torch.zeros(lanes, WIDTH) for _ in range(layers)]
        self.everyone: list[Sequence] = []

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self.threads.close()

    def start_at(self, number: int) -> None:
        """As after so many steps."""
        self.relay.asked = number
        for one in self.relay.channels if number else ():
            one._state[1] = number - 2**32
            for flag in (one.request, one.answer):
                ctypes.c_uint32.from_address(flag).value = number

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._numbers).half()

    def arrive(self, length: int) -> Sequence:
        """A request with KV of so many tokens; nobody's blocks are ever given to another."""
        new = Sequence(len(self.everyone), length=length)
        self.everyone.append(new)
        need = length // BLOCK + 1  # with the next token
        self.tier.reserve(new.slot + 1, need)
        self.tier.grow(new.slot, need)
        for layer in range(self.layers):
            new.k.append(self.randn(length, KV_HEADS, DIM))
            new.v.append(self.randn(length, KV_HEADS, DIM))
            for t in range(length):
                block = self.memory.tensor[self.tier.tables[layer, new.slot, t // BLOCK]]
                block[:, 0].view(KV_HEADS, DIM, BLOCK)[:, :, t % BLOCK] = new.k[layer][t]
                block[:, 1].view(KV_HEADS, BLOCK, DIM)[:, t % BLOCK] = new.v[layer][t]
        return new

    def begin(self, beginners: list[Sequence]) -> None:
        """They get their lanes, and a block for the new token."""
        for lane, one in enumerate(beginners):
            one.lane, one.layer = lane, 0
            need = one.length // BLOCK + 1
            self.tier.reserve(0, need)
            self.tier.grow(one.slot, need)

    def inputs(self, members: list[Sequence]) -> RelayRows:
        lanes = max([m.lane for m in members]) + 1
        slots = np.full((self.layers + 1, lanes), NOBODY, dtype=np.int32)
        lengths = np.ones_like(slots)
        for m in members:
            slots[m.layer, m.lane], lengths[m.layer, m.lane] = m.slot, m.length + 1
        return RelayRows(FIRST, slots, lengths)

    def run(self, given: RelayRows, rows: int) -> None:
        """The device's part of a step, held against float64 layer by layer."""
        mine = slice(FIRST, FIRST + rows)
        self.relay.begin(given, FIRST, rows)
        self.relay.turn(self.device.stream)
        for layer in range(self.layers):
            qkv, hidden = self.randn(FIRST + rows, WIDTH), self.randn(FIRST + rows, HIDDEN)
            self.qkv[: FIRST + rows], self.hidden[: FIRST + rows] = self.device(qkv), self.device(hidden)
            self.relay.exchange(layer, self.device.stream)
            self.device.wait()
            now = self.hidden.cpu()
            assert torch.equal(now[:FIRST], hidden[:FIRST])
            assert torch.equal(now[mine], self.kept[layer, :rows])
            self.kept[layer, :rows] = hidden[mine]
            for lane in given.coming(layer).tolist():
                whose = self.everyone[given.slots[layer + 1, lane]]
                self.check_attention(layer, lane, whose, int(given.lengths[layer + 1, lane]))
            self.sent[layer][:rows] = qkv[mine]
            if layer + 1 < self.layers:
                positions = torch.from_numpy(given.lengths[layer + 1].astype(np.int64) - 1)
                turned = self.rotary(positions.to(self.device.name))
                to = slice(FIRST, FIRST + given.lanes)
                for found, expected in ((self.cos, turned.cos), (self.sin, turned.sin)):
                    assert torch.allclose(found[to], expected[:, 0], atol=2e-3)

    def check_attention(self, layer: int, lane: int, whose: Sequence, length: int) -> None:
        """Of what went to the host in the step before."""
        q, k, v = (
            part.half().view(-1, DIM)
            for part in self.sent[layer][lane].split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM])
        )
        whose.k[layer] = torch.cat([whose.k[layer], k[None]])
        whose.v[layer] = torch.cat([whose.v[layer], v[None]])
        assert len(whose.k[layer]) == length
        expected = attention(q, whose.k[layer], whose.v[layer], DIM**-0.5).flatten()
        error = (self.attended[FIRST + lane].cpu().double() - expected).abs().max()
        assert error <= 2 * EPSILON[torch.float16] * max(1.0, float(whose.v[layer].abs().max()))


def advance(members: list[Sequence], layers: int) -> list[Sequence]:
    """Who is still within a token behind a step."""
    for one in members:
        one.layer += 1
        if one.layer > layers:
            one.layer, one.length = 0, one.length + 1
    return [one for one in members if one.layer]


@pytest.mark.parametrize("ahead", [False, True], ids=["ended", "ahead"])
@pytest.mark.parametrize(("layers", "relay_rows", "first"), [(1, 1, 0), (3, 4, 0), (5, 3, 2**32 - 4)])
def test_tokens_go_from_layer_to_layer(
    device: Device, layers: int, relay_rows: int, first: int, ahead: bool
) -> None:
    """Requests come and go, also within a token; ``ahead``: the host knows a step while one runs."""
    lanes = 1 << (relay_rows - 1).bit_length()  # as the executor makes room
    with Scene(device, layers, lanes, seed=layers, first=first) as scene:
        dice, inside = scene.random, []
        idle = [scene.arrive(n) for n in (0, 15, 16, 31, 70)]
        queue: list[tuple[RelayRows, Submitted]] = []
        ran = served = 0

        def run() -> None:
            given, told = queue.pop(0)
            scene.run(given, dice.choice([given.lanes, lanes]))
            scene.threads.finish(told)
            times = told.seconds()
            assert times.shape == (layers, 1, 2)
            assert (np.diff(times.ravel()) >= 0).all()
            assert times[0, 0, 0] > 0

        for _ in range(6 * layers + 6):
            dice.shuffle(idle)
            beginners = [idle.pop() for _ in range(dice.randint(0, min(relay_rows, len(idle))))]
            scene.begin(beginners)
            inside = [one for one in inside if dice.random() > 0.1] + beginners  # some are given up
            if not inside:
                idle.append(scene.arrive(dice.randint(0, 40)))
                continue
            given = scene.inputs(inside)
            served += int((given.slots[1:] != NOBODY).sum())
            queue.append((given, scene.threads.submit_relay(scene.host, given)))
            if len(queue) > ahead:
                run()
                ran += 1
            within = advance(inside, layers)
            idle += [one for one in inside if not one.layer]
            inside = within
            if dice.random() < 0.3:
                idle.append(scene.arrive(dice.randint(0, 100)))
        while queue:
            run()
        assert ran > 3 * layers
        assert served > 3 * layers


def test_lanes_may_have_any_gaps(device: Device) -> None:
    """Every other lane was given up, in layer after layer: far more runs of lanes than layers."""
    layers, lanes = 40, 64
    with Scene(device, layers, lanes) as scene:
        slots = np.full((layers + 1, lanes), NOBODY, dtype=np.int32)
        slots[1:, ::2] = [scene.arrive(0).slot for _ in range(lanes // 2)]
        alone = RelayRows(FIRST, slots[:, :1], np.ones((layers + 1, 1), dtype=np.int32))
        many = RelayRows(FIRST, slots, np.ones((layers + 1, lanes), dtype=np.int32))
        scene.relay.packed.copy_(scene.randn(layers, lanes, WIDTH))
        scene.threads.finish(scene.threads.submit_relay(scene.host, alone))
        told = scene.threads.submit_relay(scene.host, many)
        for channel in scene.relay.channels:
            ctypes.c_uint32.from_address(channel.request).value = 1
        scene.threads.finish(told)
        v = scene.relay.packed.view(layers, lanes, -1, DIM)[:, ::2, HEADS + KV_HEADS :]
        answer = scene.relay.answer.view(layers, lanes, HEADS, DIM)
        # Sequences of one token: what is attended to is the token's own V.
        assert torch.equal(answer[:, ::2], v.repeat_interleave(HEADS // KV_HEADS, 2))
        assert not answer[:, 1::2].any()
        assert told.seconds().shape == (layers, 1, 2)


def test_tables_stay_until_the_job_has_ended(device: Device) -> None:
    """A step behind may make them grow while the host still reads those of this one."""
    with Scene(device, 2, 1) as scene:
        scene.relay.asked = 1  # so the job waits
        given = scene.inputs([Sequence(scene.arrive(3).slot, layer=1, length=3)])
        told = scene.threads.submit_relay(scene.host, given)
        old = weakref.ref(scene.tier.tables)
        scene.tier.reserve(50, 50)
        gc.collect()
        assert old() is not None
        for channel in scene.relay.channels:
            ctypes.c_uint32.from_address(channel.request).value = 1
        scene.threads.finish(told)
        del told
        gc.collect()
        assert old() is None


def test_a_failure_names_its_layer_and_answers_everything(device: Device) -> None:
    """The device waits for nobody, and the next step may ask again."""
    with Scene(device, 3, 4) as scene:
        members = [scene.arrive(3) for _ in range(3)]
        for lane, one in enumerate(members):
            one.lane, one.layer = lane + (lane > 0), 2  # a gap: the layer has two runs
        scene.tier.tables[1, members[2].slot, 0] = 99999
        given = scene.inputs(members)
        told = scene.threads.submit_relay(scene.host, given)
        with pytest.raises(EngineError, match=r"^CPU_ATTN failed: layer 1: block_tables.*99999"):
            scene.threads.finish(told)
        scene.relay.begin(given, FIRST, 4)
        for layer in range(3):
            scene.relay.exchange(layer, device.stream)
        device.wait()
        assert [channel.requested for channel in scene.relay.channels] == [1, 1, 1]
        assert not any(channel.failed for channel in scene.relay.channels)


def test_times_of_a_layer_span_its_runs() -> None:
    runs = [SimpleNamespace(layer=layer) for layer in (0, 0, 0, 1, 2, 2)]
    times = np.array([[1, 2], [2, 4], [5, 6], [7, 8], [9, 11], [11, 15], [0, 0]])
    assert layer_times(runs, times, 3).tolist() == [[1, 6], [7, 8], [9, 15]]


def test_more_lanes_than_there_is_room_for_are_refused(device: Device) -> None:
    """Before anything is written."""
    with Scene(device, 2, 2) as scene:
        given = scene.inputs([Sequence(scene.arrive(3).slot, lane=2, layer=1, length=3)])
        with pytest.raises(ValueError, match="could not broadcast"):
            scene.relay.begin(given, FIRST, 2)
        with pytest.raises(ValueError, match="could not broadcast"):
            scene.host.job(given)
        assert scene.relay.asked == 0
