"""Tiny models of every supported family as Hugging Face folders, and what transformers makes of them.

Import after ``pytest.importorskip("torch")`` and ``pytest.importorskip("transformers")``.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests touch no network

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of transformers' own imports
    import transformers
    from transformers import AutoModelForCausalLM

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # the least that the CPU kernels take
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "dtype": "float32",
}


def tiny_config(arch: str, **over: Any) -> Any:
    """A transformers config of ``arch`` (one of ARCHITECTURES): SIZES, with ``over`` replacing its fields."""
    fields = {**SIZES, **({"sliding_window": None} if arch == "mistral" else {}), **over}
    if "rope_parameters" in fields and int(transformers.__version__.partition(".")[0]) < 5:
        fields.update(old_rope(fields.pop("rope_parameters")))
    with quiet():
        return getattr(transformers, f"{_CLASSES[arch]}Config")(**fields)


def old_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5 in the fields of transformers 4."""
    scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
    plain = scaling["rope_type"] == "default"
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": None if plain else scaling}


def save_tiny(
    folder: Path,
    arch: str,
    seed: int = 0,
    *,
    max_shard_size: str = "50MB",
    dtype: str = "float32",
    **over: Any,
) -> Path:
    """Save a random tiny model of ``arch`` into ``folder`` with ``save_pretrained``, and return the folder.

    transformers initialises with a standard deviation of 0.02, which leaves all logits nearly equal. Here a
    matrix has 2 / sqrt(columns), embeddings 1, biases 0.5, and norms lie within 0.5 .. 1.5: every part of the
    model matters, and the best two logits lie apart by far more than rounding.
    """
    with quiet():
        model = getattr(transformers, f"{_CLASSES[arch]}ForCausalLM")(tiny_config(arch, **over))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight.uniform_(0.5, 1.5, generator=generator)
                elif name.endswith("bias"):
                    weight.normal_(0.0, 0.5, generator=generator)
                elif "embed_tokens" in name:
                    weight.normal_(0.0, 1.0, generator=generator)
                else:
                    weight.normal_(0.0, 2.0 * weight.shape[1] ** -0.5, generator=generator)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def hf_model(folder: Path, dtype: str = "float32") -> Any:
    """The folder's model as transformers runs it, with the attention that its tests take as the reference."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
        )
    return model.eval()


def hf_logits(folder: Path, tokens: Sequence[int], dtype: str = "float32") -> torch.Tensor:
    """Float32 logits ``[len(tokens), vocab]`` of transformers."""
    with quiet(), torch.inference_mode():
        return hf_model(folder, dtype)(torch.tensor([list(tokens)])).logits[0].float()


def hf_greedy(folder: Path, prompt_ids: Sequence[int], n: int, *, eos: bool = False) -> list[int]:
    """What transformers generates greedily in float32: ``n`` tokens, fewer where ``eos`` is to end it."""
    return hf_generate(hf_model(folder), prompt_ids, n, eos=eos)


def hf_generate(model: Any, prompt_ids: Sequence[int], n: int, *, eos: bool = False) -> list[int]:
    """The same of a model that ``hf_model`` gave."""
    prompt = torch.tensor([list(prompt_ids)])
    # The model's own, too: where the one that is given says None, generate asks the other.
    config, own = copy.deepcopy(model.generation_config), model.generation_config
    config.do_sample = False
    config.max_new_tokens, config.max_length = n, None
    config.pad_token_id = 0
    if not eos:
        config.eos_token_id = None
    model.generation_config = config
    try:
        with quiet(), torch.inference_mode():
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    finally:
        model.generation_config = own
    return [int(token) for token in out[0, len(prompt_ids) :]]


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing on the screen, and no error of transformers' warnings about itself."""
    level, bars = (
        logging.getLogger("transformers").level,
        transformers.utils.logging.is_progress_bar_enabled(),
    )
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.getLogger("transformers").setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
