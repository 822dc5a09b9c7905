"""Logits of the engine in bf16 on a GPU, of a real shape, beside those of the same weights in float32.

    python benchmarks/gpu/logits.py --model llama-3.1-8b

Every policy generates a few tokens from prompts of different lengths, some of them in chunks; for each
token the logits that it was chosen from are held against those of one pass in float32 over the prompt and
what was generated before. Norms get random weights, 1/8 to 2, as trained ones vary; they are copied in
float32 before the engine may fold them into matrices. Prints ||engine - reference|| / ||reference||, the
median and the largest of all tokens; ends with 1 if the largest is above --most.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from neo.core.view import Limits
from neo.runtime.engine_config import EngineConfig
from neo.runtime.model import Model
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.setup import EngineParts
from neo.runtime.weights import Weights

PROMPTS = (7, 64, 300, 1000, 1700)
TOKENS = 12


def in_float32(model: Model) -> Model:
    """The same weights, and what is computed with them, in float32."""
    weights = model.weights
    layers = [
        replace(w, **{f.name: t.float() for f in fields(w) if (t := getattr(w, f.name)) is not None})
        for w in weights.layers
    ]
    wide = Weights(weights.embedding.float(), tuple(layers), weights.norm.float(), weights.head.float())
    return Model(replace(model.config, dtype="float32"), wide)


def spread_norms(model: Model) -> None:
    """Other weights for the layers' norms."""
    generator = torch.Generator(model.device).manual_seed(2)
    for layer in model.weights.layers:
        for norm in (layer.input_norm, layer.post_norm):
            size = torch.rand(norm.shape, generator=generator, device=model.device)
            norm.copy_(torch.exp2(4 * size - 3))


def reference(model: Model, tokens: list[int], first: int) -> Tensor:
    """Logits, float32 on the host, behind every token from number ``first`` on."""
    ids = torch.tensor(tokens, device=model.device)
    rope = model.rope(torch.arange(len(tokens), device=model.device))
    hidden = model.embed(ids)
    for layer in range(model.config.layers):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in model.pre(layer, hidden, rope))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        hidden = model.post(layer, hidden, attended[0].transpose(0, 1))
    return model.head(hidden[first:]).cpu()


def generated(
    parts: EngineParts, policy: str, blocks: tuple[int, int]
) -> dict[str, tuple[list[int], Tensor]]:
    """By prompt: its tokens and what was generated, and the logits of every generated token."""
    engine = parts.engine(parts.system(policy=policy, kv_gpu_blocks=blocks[0], kv_cpu_blocks=blocks[1]))
    executor: Any = engine.executor
    found: dict[str, list[Tensor]] = {}
    start = executor.start

    def watched(plan: Any, graph: Any, inputs: Any, copies: Any, sample: Any) -> Any:
        def keep(logits: Tensor, requests: tuple[str, ...]) -> Any:
            for row, request in zip(logits.float().cpu(), requests, strict=True):
                found.setdefault(request, []).append(row)
            return sample(logits, requests)

        return start(plan, graph, inputs, copies, keep)

    executor.start = watched
    tokens = {}
    generator = torch.Generator().manual_seed(1)
    for n in PROMPTS:
        tokens[str(n)] = torch.randint(0, parts.spec.vocab, (n,), generator=generator).tolist()
        engine.add(str(n), tokens[str(n)], SamplingParams(TOKENS, 0.0, ignore_eos=True))
    while engine.has_work:
        for output in engine.step():
            if output.token is not None:
                tokens[output.request_id].append(output.token)
    engine.close()
    return {r: (t, torch.stack(found[r])) for r, t in tokens.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--policies", nargs="+", default=["gpu-only", "fastdecode"])
    parser.add_argument("--most", type=float, default=2e-2)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    parts = EngineParts(
        EngineConfig(
            args.model,
            load_format="dummy",
            dtype=args.dtype,
            device=args.device,
            limits=Limits(max_batch_tokens=512, max_seqs=16),
            max_model_len=2048,
            ahead=True,
        )
    )
    spread_norms(parts.model)
    wide = in_float32(parts.model)
    found = {p: generated(parts, p, (300, 300)) for p in args.policies}
    gc.collect()
    worst = 0.0
    for policy, requests in found.items():
        errors = []
        with torch.inference_mode():
            for n, (tokens, logits) in requests.items():
                exact = reference(wide, tokens[:-1], int(n) - 1)
                errors += ((logits - exact).norm(dim=1) / exact.norm(dim=1)).tolist()
        worst = max(worst, *errors)
        middle = statistics.median(errors)
        print(f"{policy:12} {len(errors)} tokens: median {middle:.2e}, most {max(errors):.2e}")
    sys.exit(worst > args.most)


if __name__ == "__main__":
    main()
