"""The most that a host can add to the throughput of a GPU that holds little KV, by its bandwidth.

A request costs the GPU P for its prompt (operations over the rate of products) and D for decoding, where
P + D = 1 / (throughput of the GPU alone). If the host decodes a share f of the tokens and that costs the GPU
nothing, P + (1 - f) D = f B / R, the time it takes to read f of the KV bytes B that decoding a request reads,
at the rate R of plain reading.
"""

from __future__ import annotations

from neo.core.specs import ModelSpec

PROMPT = 1000  # tokens


def best_gain(model: ModelSpec, output: int, throughput: float, products: float, read: float) -> float:
    """Throughput with the host over that without it, at most.

    Args:
        output: tokens of a request, behind a prompt of ``PROMPT``.
        throughput: requests/s without the host.
        products: operations/s.
        read: bytes/s.
    """
    prompt_s = PROMPT * 2.0 * model.params / products
    decode_s = max(0.0, 1.0 / throughput - prompt_s)
    read_s = output * (PROMPT + output / 2) * model.kv_bytes_per_token / read
    share = min(1.0, (prompt_s + decode_s) / (decode_s + read_s))
    return (prompt_s + decode_s) / (prompt_s + (1.0 - share) * decode_s)
