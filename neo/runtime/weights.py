"""A model's weights: where they come from (safetensors or random numbers) and how they lie in memory.

Each tensor is allocated once, in its final place and dtype, and filled piece by piece: Q, K and V become one
matrix, gate and up another. No second copy of the model ever exists; checkpoints are memory-mapped.
"""

from __future__ import annotations

import re
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neo.core.errors import InputError
from neo.cost.schemas import read_json
from neo.runtime.model_config import ModelConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_READABLE = ("F32", "F16", "BF16")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # buffers in checkpoints of transformers before 4.32
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; matrices are ``[out, in]``, a bias or norm that the model lacks is None."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(heads + 2 kv_heads) head_dim, hidden]
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]: the norm's weight, repeated for each head
    out: Tensor  # [hidden, heads head_dim]
    out_bias: Tensor | None
    post_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 intermediate, hidden]
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, intermediate]
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """All layers, the embedding ``[vocab, hidden]``, the last norm, and the head (tied: the embedding)."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor


class TensorSource(Protocol):
    """Where weights come from."""

    def fill(self, name: str, out: Tensor) -> None:
        """Write the tensor that Hugging Face calls ``name`` into ``out``, which has its shape."""

    def finish(self, config: ModelConfig, weights: Weights) -> None:
        """Called once all are filled; may object to what was left over."""


def load_weights(
    config: ModelConfig, source: TensorSource, dtype: torch.dtype, device: torch.device
) -> Weights:
    """Weights of ``config`` from ``source``, fused, in ``dtype`` on ``device``."""
    build = _Builder(source, dtype, device)
    size, wide = config.hidden, config.head_dim * config.heads
    embedding = build.tensor((config.vocab, size), ("model.embed_tokens.weight", config.vocab))
    layers = tuple(_layer(config, build, f"model.layers.{i}.", size, wide) for i in range(config.layers))
    norm = build.tensor((size,), ("model.norm.weight", size))
    head = embedding
    if not config.tied_embeddings:
        head = build.tensor((config.vocab, size), ("lm_head.weight", config.vocab))
    weights = Weights(embedding, layers, norm, head)
    source.finish(config, weights)
    return weights


class _Builder:
    """Allocates tensors and has their rows filled from the source."""

    def __init__(self, source: TensorSource, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype, self.device = source, dtype, device

    def tensor(self, shape: tuple[int, ...], *parts: tuple[str, int]) -> Tensor:
        """A tensor whose first axis is made of ``parts``: names and numbers of rows."""
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        start = 0
        for name, rows in parts:
            self.source.fill(name, out[start : start + rows])
            start += rows
        return out

    def repeated(self, width: int, *parts: tuple[str, int]) -> Tensor:
        """A vector per row, each of ``parts`` for as many rows as it says: ``[rows, width]``."""
        vectors = [self.tensor((width,), (name, width)).expand(rows, width) for name, rows in parts]
        return torch.cat(vectors)


def _layer(config: ModelConfig, build: _Builder, at: str, size: int, wide: int) -> LayerWeights:
    narrow, inner = config.head_dim * config.kv_heads, config.intermediate
    attention, mlp = at + "self_attn.", at + "mlp."
    qkv = (
        (attention + "q_proj.", wide),
        (attention + "k_proj.", narrow),
        (attention + "v_proj.", narrow),
    )
    gate_up = ((mlp + "gate_proj.", inner), (mlp + "up_proj.", inner))

    def matrix(columns: int, *parts: tuple[str, int]) -> Tensor:
        rows = sum(count for _, count in parts)
        return build.tensor((rows, columns), *((name + "weight", count) for name, count in parts))

    def bias(there: bool, *parts: tuple[str, int]) -> Tensor | None:
        if not there:
            return None
        return build.tensor((sum(n for _, n in parts),), *((name + "bias", n) for name, n in parts))

    norms = ((attention + "q_norm.weight", config.heads), (attention + "k_norm.weight", config.kv_heads))
    return LayerWeights(
        input_norm=build.tensor((size,), (at + "input_layernorm.weight", size)),
        qkv=matrix(size, *qkv),
        qkv_bias=bias(config.qkv_bias, *qkv),
        qk_norm=build.repeated(config.head_dim, *norms) if config.qk_norm else None,
        out=matrix(wide, (attention + "o_proj.", size)),
        out_bias=bias(config.out_bias, (attention + "o_proj.", size)),
        post_norm=build.tensor((size,), (at + "post_attention_layernorm.weight", size)),
        gate_up=matrix(size, *gate_up),
        gate_up_bias=bias(config.mlp_bias, *gate_up),
        down=matrix(inner, (mlp + "down_proj.", size)),
        down_bias=bias(config.mlp_bias, (mlp + "down_proj.", size)),
    )


class Checkpoint:
    """The safetensors files of a Hugging Face folder, memory-mapped while open. Never unpickles anything.

    Raises:
        InputError: on opening or reading, with the file and the tensor: a file is missing, cut off or not
            safetensors; a tensor is missing, of another shape or dtype, or is none of the model's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ExitStack()
        self._where: dict[str, tuple[Any, Path]] = {}
        self._used: set[str] = set()
        self._listing = folder / SINGLE

    def __enter__(self) -> Checkpoint:
        try:
            self._open()
        except BaseException:
            self._files.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._where.clear()
        self._files.close()

    def fill(self, name: str, out: Tensor) -> None:
        """Copy tensor ``name`` into ``out``, converting its dtype."""
        self._used.add(name)
        if name not in self._where:
            raise InputError(f"checkpoint {self._listing}: tensor {name}: is missing")
        file, path = self._where[name]
        view = file.get_slice(name)
        shape, stored = tuple(view.get_shape()), view.get_dtype()
        if stored not in _READABLE:
            raise InputError(
                f"checkpoint {path}: tensor {name}: dtype {stored} is not one of {', '.join(_READABLE)} "
                "(quantized weights are not supported)"
            )
        if shape != tuple(out.shape):
            raise InputError(
                f"checkpoint {path}: tensor {name}: shape {list(shape)}, but the config makes it "
                f"{list(out.shape)}"
            )
        out.copy_(file.get_tensor(name))
        if out.dtype == torch.float16 and stored != "F16" and not bool(out.isfinite().all()):
            raise InputError(
                f"checkpoint {path}: tensor {name}: holds values that float16 cannot; use bfloat16 or float32"
            )

    def finish(self, config: ModelConfig, weights: Weights) -> None:
        """Object to tensors that the model has no place for: it would be another model without them."""
        left = sorted(n for n in self._where.keys() - self._used if not _RECOMPUTED.search(n))
        if config.tied_embeddings and "lm_head.weight" in left:
            left.remove("lm_head.weight")
            file, path = self._where["lm_head.weight"]
            stored = file.get_tensor("lm_head.weight").to(weights.head.dtype)
            if not torch.equal(stored, weights.embedding.cpu()):
                raise InputError(
                    f"checkpoint {path}: tensor lm_head.weight: differs from the embedding, but the config "
                    "ties them; set tie_word_embeddings to false in config.json"
                )
        if left:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise InputError(
                f"checkpoint {self._where[left[0]][1]}: tensor {left[0]}{more}: not a tensor of a "
                f"{config.architecture} model with {config.layers} layers, as the config describes it"
            )

    def _open(self) -> None:
        if (self.folder / SINGLE).is_file():
            self._add(self.folder / SINGLE, None)
        elif (self.folder / INDEX).is_file():
            self._listing = self.folder / INDEX
            for shard, names in self._shards(self._listing).items():
                self._add(self.folder / shard, names)
        else:
            raise InputError(_no_weights(self.folder))

    def _shards(self, index: Path) -> dict[str, list[str]]:
        """Tensor names by file, as the index says."""
        data = read_json(index, "checkpoint index")
        listed = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(listed, dict) or not listed:
            raise InputError(f"checkpoint index {index}: weight_map: is missing")
        shards: dict[str, list[str]] = {}
        for name, shard in listed.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise InputError(f"checkpoint index {index}: weight_map.{name}: {shard!r} is not a file name")
            shards.setdefault(shard, []).append(name)
        for shard in shards:
            if not (self.folder / shard).is_file():
                raise InputError(f"checkpoint index {index}: names {shard}, which is not in the folder")
        return shards

    def _add(self, path: Path, names: list[str] | None) -> None:
        """Map a file; ``names`` are those the index promises in it (None: all)."""
        try:
            file = self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"checkpoint {path}: {_why_unreadable(path, error)}") from error
        stored = set(file.keys())
        for name in names if names is not None else stored:
            if name not in stored:
                raise InputError(f"checkpoint {path}: tensor {name}: is missing (the index names this file)")
            self._where[name] = (file, path)


class RandomWeights:
    """Random weights, the same for the same seed, device kind and dtype whatever else the model holds.

    Matrices are uniform with variance 1 / columns, so that rows of unit size stay so; what adds to the
    residual stream is divided by sqrt(2 layers) (as GPT-2's initialisation), so that activations stay finite
    at any depth. Norms are 1, biases 0.
    """

    def __init__(self, seed: int, layers: int) -> None:
        self._seed = seed
        self._depth = (2 * layers) ** -0.5

    def fill(self, name: str, out: Tensor) -> None:
        """Random numbers that depend on seed and ``name``."""
        if out.dim() == 1:
            out.fill_(0.0 if name.endswith(".bias") else 1.0)
            return
        generator = torch.Generator(device=out.device)
        generator.manual_seed(zlib.crc32(name.encode(), self._seed & 0xFFFFFFFF))
        bound = (3.0 / out.shape[1]) ** 0.5  # uniform within +-b has variance b^2 / 3
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            bound *= self._depth
        out.uniform_(-bound, bound, generator=generator)

    def finish(self, config: ModelConfig, weights: Weights) -> None:
        """Nothing can be left over."""


def _why_unreadable(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return "is a Git LFS pointer, not the weights; run 'git lfs pull' in the folder"
    except OSError:
        pass
    return f"cannot be read as safetensors (cut off or damaged?): {error}"


def _no_weights(folder: Path) -> str:
    pickled = sorted(p.name for pattern in _PICKLED for p in folder.glob(pattern))
    if pickled:
        return (
            f"model folder {folder}: holds {pickled[0]} but no {SINGLE}; neo does not unpickle weights: "
            "convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return f"model folder {folder}: holds neither {SINGLE} nor {INDEX}"
