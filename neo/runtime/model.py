"""The model runner: a Llama-like decoder cut where attention is, so that others decide who attends and where.

A step is ``rope`` and ``embed`` once; for each layer ``pre``, attention (not here), ``post``; then ``head``:

    rope = model.rope(positions)
    hidden = model.embed(tokens)
    for layer in range(model.config.layers):
        q, k, v = model.pre(layer, hidden, rope)
        hidden = model.post(layer, hidden, attend(layer, q, k, v))
    logits = model.head(hidden[last_rows])

Rows are tokens of any requests in any order: nothing here mixes rows, and nothing is kept between calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu

from neo.core.errors import InputError
from neo.core.plugins import close_matches
from neo.runtime.kv_memory import available_bytes
from neo.runtime.model_config import ModelConfig, named_config, read_config
from neo.runtime.products import linear
from neo.runtime.rope import Rope, RotaryEmbedding, rotate
from neo.runtime.weights import Checkpoint, RandomWeights, Weights, load_weights

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_GIB = 1 << 30
LOAD_FORMATS = ("auto", "safetensors", "dummy")


class Model:
    """A decoder with its weights on one device. Call its methods under ``torch.inference_mode``.

    Attributes:
        config: what it is; ``config.dtype`` is the dtype it runs in.
        dtype: of weights, hidden states, and q, k, v.
        device: where weights are and arguments must be.
        rotary: frequencies of its rotation.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, self.dtype, self.device)
        self._rotated = config.heads + config.kv_heads  # heads of Q and K

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        load_format: str = "auto",
        dtype: str | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> Model:
        """The model of a Hugging Face folder, or random weights of a shape.

        Args:
            source: a folder with ``config.json`` and safetensors; for ``dummy`` also a ``config.json`` alone,
                or the name of a preset (``neo models``).
            load_format: ``auto`` and ``safetensors`` read the folder's weights, ``dummy`` makes them up.
            dtype: ``float32``, ``float16`` or ``bfloat16``; None for what the config says.
            device: any torch device.
            seed: of dummy weights.

        Raises:
            InputError: names file, field or tensor where something is missing, wrong or not supported.
        """
        if load_format not in LOAD_FORMATS:
            near = close_matches(load_format, LOAD_FORMATS)
            raise InputError(f"load format '{load_format}' is not one of {', '.join(LOAD_FORMATS)}{near}")
        if dtype is not None and dtype not in DTYPES:
            raise InputError(
                f"dtype '{dtype}' is not one of {', '.join(DTYPES)}{close_matches(dtype, DTYPES)}"
            )
        path = Path(source).expanduser()
        dummy = load_format == "dummy"
        config = named_config(str(source)) if dummy and not _is_hugging_face(path) else read_config(path)
        config = replace(config, dtype=dtype or config.dtype)
        place = (DTYPES[config.dtype], _usable(device))
        _check_room(config, place[1])
        if dummy:
            return cls(config, load_weights(config, RandomWeights(seed, config.layers), *place))
        if not path.is_dir():
            raise InputError(f"model '{path}': give the folder, not a file (only dummy weights need no more)")
        with Checkpoint(path) as checkpoint:
            return cls(config, load_weights(config, checkpoint, *place))

    def rope(self, positions: Tensor) -> Rope:
        """What ``pre`` needs of ``positions`` (int64 ``[T]``); once per step."""
        return self.rotary(positions)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states ``[T, hidden]`` of ``tokens`` (int64 ``[T]``)."""
        return embedding(tokens, self.weights.embedding)

    def pre(self, layer: int, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, Q, K and V projections, rotation.

        Returns:
            q ``[T, heads, head_dim]``, k and v ``[T, kv_heads, head_dim]``. Heads of a row lie side by side;
            rows lie further apart (q and k share one tensor, v is part of another).
        """
        config, weights = self.config, self.weights.layers[layer]
        x = rms_norm(hidden, (config.hidden,), weights.input_norm, config.rms_eps)
        fused = linear(x, weights.qkv, weights.qkv_bias)
        heads = fused.view(len(x), self._rotated + config.kv_heads, config.head_dim)
        qk, v = heads[:, : self._rotated], heads[:, self._rotated :]
        if weights.qk_norm is not None:
            qk = rms_norm(qk, (config.head_dim,), None, config.rms_eps).mul_(weights.qk_norm)
        qk = rotate(qk, rope)
        return qk[:, : config.heads], qk[:, config.heads :], v

    def post(self, layer: int, hidden: Tensor, attention: Tensor) -> Tensor:
        """Output projection and feed-forward network, each added to the residual stream.

        Args:
            layer: which.
            hidden: ``[T, hidden]`` as given to ``pre``; overwritten with the result.
            attention: ``[T, heads, head_dim]``.

        Returns:
            ``hidden``, after the layer.
        """
        config, weights = self.config, self.weights.layers[layer]
        hidden += linear(attention.flatten(1), weights.out, weights.out_bias)
        x = rms_norm(hidden, (config.hidden,), weights.post_norm, config.rms_eps)
        gate, up = linear(x, weights.gate_up, weights.gate_up_bias).chunk(2, -1)
        hidden += linear(silu(gate).mul_(up), weights.down, weights.down_bias)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, float32 ``[R, vocab]``, of the rows ``hidden [R, hidden]`` that a token is wanted for."""
        return self.logits(hidden).float()

    def logits(self, hidden: Tensor, product: Callable[[Tensor, Tensor], Tensor] = linear) -> Tensor:
        """The same in the model's own dtype; ``product``: of rows and the matrix ``[vocab, hidden]``."""
        x = rms_norm(hidden, (self.config.hidden,), self.weights.norm, self.config.rms_eps)
        return product(x, self.weights.head)


def _check_room(config: ModelConfig, device: torch.device) -> None:
    """Raise InputError, with the numbers, before a model is read that its memory cannot hold."""
    asked = config.spec().weight_bytes
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if free is not None and asked > free:
        raise InputError(
            f"model '{config.name}': weights in {config.dtype} take {asked / _GIB:.1f} GiB, "
            f"{free / _GIB:.1f} GiB of the memory of '{device.type}' are free"
        )


def _usable(device: str | torch.device) -> torch.device:
    """``device``, or an InputError where this machine's torch cannot use it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch is built without it
        why = " ".join(str(error).split("\n")[0].split())
        raise InputError(f"device '{device}' cannot be used: {why}") from error


def _is_hugging_face(path: Path) -> bool:
    """Whether ``path`` is a folder or a JSON file, rather than a preset's name or a model TOML."""
    return path.is_dir() or (path.suffix == ".json" and path.is_file())
