"""Arrays on their way to the device: what was sent stays what it was, in whichever room it lay."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the engine needs torch")

import torch

from neo.runtime.cuda_sender import Sender


@pytest.mark.parametrize("room", [64, 4096], ids=["too small for some", "large"])
def test_arrays_arrive_and_stay_when_their_room_is_used_again(room: int) -> None:
    sender = Sender(torch.device("cpu"), room)
    random = np.random.default_rng(0)
    sent = []
    for _ in range(5):
        sender.begin()
        for dtype, shape in ((np.int32, (3,)), (np.int64, (2, 2)), (np.int32, (0,)), (np.int32, (4, 9))):
            values = random.integers(-1000, 1000, shape).astype(dtype)
            sent.append((values.copy(), sender.send(values)))
            values[:] = 7
    for values, arrived in sent:
        assert torch.equal(torch.from_numpy(values), arrived)
        assert arrived.dtype == torch.from_numpy(values).dtype
