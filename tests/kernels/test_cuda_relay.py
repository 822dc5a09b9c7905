"""Rows that wait in a layer until the next step comes by: the kernel alone, the test as its host."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import pytest
import torch
from cuda_cases import Device, device

from neo.runtime import cuda_library as c
from neo.runtime import cuda_transfers as ct
from neo.runtime.cuda_kernels import Launch

__all__ = ["device"]

Q, KV, HIDDEN, DIM = 64, 32, 96, 16  # elements of a row
BY, GAP = 2, 8  # bytes of one; elements between rows that nobody may touch
WIDTHS = {
    "q": Q, "k": KV, "v": KV, "packed": Q + 2 * KV, "came": Q, "out": Q, "hidden": HIDDEN, "kept": HIDDEN,
    "cos": DIM, "sin": DIM, "next_cos": DIM, "next_sin": DIM,
}  # fmt: skip
PINNED = ("packed", "came")
TAKEN = {"out": "came", "hidden": "kept", "kept": "hidden", "cos": "next_cos", "sin": "next_sin"}


def word(address: int) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address(address)


class Layer:
    """All buffers of a layer, a row longer than its rows, and the launch."""

    def __init__(
        self, where: Device, rows: int, ctas: int = 0, timeout_s: float = 20.0, angles: bool = True
    ) -> None:
        self.device, self.rows, self.angles = where, rows, angles
        self.flags = ct.Channel(where.name)
        self._random = torch.Generator().manual_seed(rows)
        self.buffers = {
            name: (where.pinned if name in PINNED else where)(self.random(width + GAP))
            for name, width in WIDTHS.items()
        }
        at = {name: buffer.data_ptr() for name, buffer in self.buffers.items()}
        if not angles:
            at |= dict.fromkeys(("cos", "sin", "next_cos", "next_sin"))
        strides = {name: buffer.stride(0) * BY for name, buffer in self.buffers.items()}
        self.launch = Launch(
            "neo_cuda_relay_rows",
            c.Relay(
                channel=ctypes.pointer(self.flags.struct),
                **at,
                **{f"{name}_stride": strides[name] for name in ("q", "k", "v", "packed", "came", "out")},
                hidden_stride=strides["hidden"],
                kept_stride=strides["kept"],
                angle_stride=strides["cos"],
                next_stride=strides["next_cos"],
                timeout_us=round(timeout_s * 1e6),
                rows=rows,
                q_bytes=Q * BY,
                kv_bytes=KV * BY,
                hidden_bytes=HIDDEN * BY,
                angle_bytes=DIM * BY if angles else 0,
                ctas=ctas,
            ),
            (self.flags, self.buffers),
        )

    def random(self, width: int) -> torch.Tensor:
        return torch.randn(self.rows + 1, width, generator=self._random).half()

    def refill(self) -> None:
        """What a step brings to the layer: other rows, other angles, the host's answers."""
        for name in ("q", "k", "v", "came", "hidden", "next_cos", "next_sin"):
            self.buffers[name].copy_(self.random(self.buffers[name].shape[1]))

    def now(self) -> dict[str, torch.Tensor]:
        return {name: buffer.cpu().clone() for name, buffer in self.buffers.items()}

    def run(self) -> None:
        self.launch(self.device.stream)
        self.device.wait()

    def expected(self) -> dict[str, torch.Tensor]:
        """All buffers behind the next launch, guards and what is only read included."""
        before, after = self.now(), self.now()
        for name, source in TAKEN.items():
            if self.angles or name not in ("cos", "sin"):
                after[name][: self.rows, : WIDTHS[name]] = before[source][: self.rows, : WIDTHS[name]]
        sent = torch.cat([before[name][: self.rows, : WIDTHS[name]] for name in "qkv"], 1)
        after["packed"][: self.rows, : WIDTHS["packed"]] = sent
        return after


@pytest.mark.parametrize("first", [0, 2**32 - 2], ids=["first", "around"])
@pytest.mark.parametrize("ctas", [0, 1, 3, 16])
@pytest.mark.parametrize("rows", [0, 1, 5, 16])
def test_rows_change_places_step_after_step(device: Device, rows: int, ctas: int, first: int) -> None:
    """Nothing else is written, and each step asks by the next number, around 2**32 too."""
    layer = Layer(device, rows, ctas)
    if first:
        layer.flags._state[1] = first - 2**32
        word(layer.flags.request).value = first
    for step in range(4):
        word(layer.flags.answer).value = (first + step) & 0xFFFFFFFF  # to the step before; none at first
        layer.refill()
        expected = layer.expected()
        layer.run()
        assert layer.flags.requested == (first + step + 1) & 0xFFFFFFFF
        for name, found in layer.now().items():
            assert torch.equal(found, expected[name]), (step, name)
    assert not layer.flags.failed


@pytest.mark.parametrize("ctas", [0, 4])
def test_behind_the_last_layer_angles_stay(device: Device, ctas: int) -> None:
    """Without bytes of angles their addresses are not looked at."""
    layer = Layer(device, 3, ctas, angles=False)
    expected = layer.expected()
    layer.run()
    for name, found in layer.now().items():
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("ctas", [1, 4])
def test_the_answer_is_awaited_before_rows_are_posted(device: Device, ctas: int) -> None:
    """Until the host has answered it may still read what the step before has sent."""
    layer = Layer(device, 4, ctas)
    layer.run()
    sent = layer.now()["packed"]
    layer.refill()
    late = layer.random(Q + GAP)
    seen = []

    def host() -> None:
        time.sleep(0.05)  # long enough for a kernel that does not wait
        seen.append((layer.flags.requested, layer.buffers["packed"].clone()))
        layer.buffers["came"].copy_(late)
        word(layer.flags.answer).value = 1

    thread = threading.Thread(target=host)
    thread.start()
    layer.launch(device.stream)
    thread.join()
    device.wait()
    requested, packed = seen[0]
    assert requested == 1
    assert torch.equal(packed, sent)
    after = layer.now()
    assert torch.equal(after["out"][:4, :Q], late[:4, :Q])
    assert torch.equal(after["packed"][:4, :Q], after["q"][:4, :Q])
    assert layer.flags.requested == 2


@pytest.mark.parametrize("ctas", [1, 4])
def test_a_missing_answer_is_an_error_and_ends_all_waiting(device: Device, ctas: int) -> None:
    """Later kernels neither wait nor post, even where the answer comes after all; a reset mends it."""
    layer = Layer(device, 4, ctas, timeout_s=0.02)
    layer.run()
    before = layer.now()
    layer.refill()
    for _ in range(20):
        layer.run()
    assert layer.flags.failed
    assert word(layer.flags.error).value == 1
    word(layer.flags.answer).value = 1
    layer.run()
    after = layer.now()
    assert layer.flags.requested == 1
    for name in ("packed", "out"):
        assert torch.equal(after[name], before[name])
    layer.flags.reset()
    expected = layer.expected()
    layer.run()
    assert layer.flags.requested == 1
    assert not layer.flags.failed
    for name, found in layer.now().items():
        assert torch.equal(found, expected[name]), name


ROWS = ("q", "k", "v", "packed", "came", "out", "hidden", "kept")
ANGLES = ("cos", "sin", "next_cos", "next_sin")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"size": 8}, "args has size 8"),
    ({"channel": None}, "channel must not be NULL"),
    ({"timeout_us": 0}, "timeout_us is 0, must be positive"),
    ({"rows": -1}, "rows is -1, must not be negative"),
    ({"rows": 2**31 - 1}, "rows is 2147483647 of 512 bytes each: too many"),
    ({"angle_bytes": 2**30, "angle_stride": 2**30, "next_stride": 2**30, "rows": 16}, "too many"),
    ({"ctas": -1}, "ctas is -1, must be 0 to 16"),
    ({"ctas": 17}, "ctas is 17, must be 0 to 16"),
    *[
        ({name: 0}, f"{name} is 0, must be a multiple of 16")
        for name in ("q_bytes", "kv_bytes", "hidden_bytes")
    ],
    *[({name: 24}, f"{name} is 24") for name in ("q_bytes", "kv_bytes", "hidden_bytes", "angle_bytes")],
    ({"angle_bytes": -16}, "angle_bytes is -16"),
    *[({f"{name}_stride": 24}, "a stride of q, k or v is 24") for name in "qkv"],
    ({"k_stride": -16}, "a stride of q, k or v is -16"),
    *[
        ({f"{name}_stride": 16}, f"{name}_stride is 16, must be a multiple of 16, at least {least}")
        for name, least in (("packed", 256), ("came", 128), ("out", 128), ("hidden", 192), ("kept", 192))
    ],
    *[({name: 16}, f"{name} is 16.*at least 32") for name in ("angle_stride", "next_stride")],
    *[({name: None}, "rows must not be NULL") for name in ROWS],
    *[({name: 8}, "rows must not be NULL, and aligned to 16 bytes") for name in ROWS],
    *[({name: None}, "angles must not be NULL") for name in ANGLES],
    *[({name: 8}, "angles must not be NULL, and aligned to 16 bytes") for name in ANGLES],
]


def test_bad_arguments_are_refused(device: Device) -> None:
    """Each with a message that names it, and nothing is launched."""
    layer = Layer(device, 2)
    good, before = layer.launch.args, layer.now()
    for changes, said in REFUSED:
        layer.launch.args = c.Relay.from_buffer_copy(good)
        for name, value in changes.items():
            setattr(layer.launch.args, name, value)
        with pytest.raises(ValueError, match=said):
            layer.launch(device.stream)
    layer.launch.args = good
    layer.flags.struct.state = None
    with pytest.raises(ValueError, match="channel: state, request, answer and error must not be NULL"):
        layer.launch(device.stream)
    device.wait()
    assert layer.flags.requested == 0
    assert all(torch.equal(found, before[name]) for name, found in layer.now().items())
