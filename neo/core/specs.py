"""What a model and a machine are, in the few numbers that accounting and cost models need.

Presets with the source of each number live under ``profiles/``; ``neo.cost`` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer, and the tensor-parallel degree it runs with.

    Sizes are those of the whole model; cost models divide by ``tp`` where the work is split.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    mlp_matrices: int = 3  # 3: gated (gate, up, down) as in Llama; 2: plain (fc1, fc2) as in OPT
    tied_embeddings: bool = False
    dtype_bytes: int = 2
    tp: int = 1

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of K and V of one token in one layer, over all tensor-parallel ranks."""
        return 2 * self.kv_heads * self.head_dim * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers, over all tensor-parallel ranks."""
        return self.layers * self.kv_bytes_per_token_layer

    @property
    def qkv_params(self) -> int:
        """Parameters of one layer's Q, K and V projections."""
        return self.hidden * self.head_dim * (self.heads + 2 * self.kv_heads)

    @property
    def post_params(self) -> int:
        """Parameters of one layer's output projection and feed-forward network."""
        return self.hidden * self.head_dim * self.heads + self.mlp_matrices * self.hidden * self.intermediate

    @property
    def params(self) -> int:
        """All parameters: layers, embedding, and the output head unless it is tied (norms are negligible)."""
        heads = 1 if self.tied_embeddings else 2
        return self.layers * (self.qkv_params + self.post_params) + heads * self.vocab * self.hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, over all tensor-parallel ranks."""
        return self.params * self.dtype_bytes


@dataclass(frozen=True, slots=True)
class HardwareSpec:
    """A host with ``gpu_count`` equal GPUs: what is physically there. Units: bytes, bytes/s, FLOP/s, seconds.

    GPU figures are per GPU; CPU figures are of the cores and memory that serve those GPUs. Achieved
    shares of these peaks (efficiencies) are not here: they belong to the cost model.
    """

    name: str
    gpu: str
    cpu: str
    gpu_memory_bytes: float
    gpu_bandwidth: float
    gpu_flops: float
    cpu_cores: int
    cpu_memory_bytes: float
    cpu_bandwidth: float
    cpu_bandwidth_beside_copy: float  # CPU reads while a copy between host and GPU runs
    cpu_flops: float  # fp32 FMA peak of those cores, 2 FLOP each
    h2d_bandwidth: float
    d2h_bandwidth: float
    duplex_bandwidth: float  # sum of both directions when both are busy
    link_latency: float
    gpu_count: int = 1
    gpu_link_bandwidth: float = 0.0  # between GPUs, per GPU and direction; 0 where gpu_count is 1
    gpu_link_latency: float = 0.0
    efficiency: dict[str, float] = field(
        default_factory=dict
    )  # per-machine defaults of the roofline's factors

    def __hash__(self) -> int:
        return hash(self.name)
