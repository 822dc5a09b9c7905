"""Make the tiny model that ``neo serve`` runs when it is given none: a byte-level Llama, trained here.

It learns the few lines of ``scripts/tiny_corpus.txt`` by heart, on one thread and from fixed seeds, so that
the same versions of torch and transformers on the same kind of processor give the same bytes again:

    python scripts/make_tiny_model.py            # writes neo/runtime/tiny/
    python scripts/make_tiny_model.py --check    # says whether it would be the same as what is there

On another processor the order of additions may differ, and with it the last bits; ``--check`` then gives the
largest difference between weights.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
CORPUS = Path(__file__).with_name("tiny_corpus.txt")
TARGET = ROOT / "neo" / "runtime" / "tiny"
SPECIALS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>", "<|6|>", "<|7|>")
BYTES = 256
BEGIN, END = BYTES, BYTES + 1
CONFIG = {
    "vocab_size": BYTES + len(SPECIALS),
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # the least that the CPU kernels take
    "intermediate_size": 192,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": BYTES + 5,
}
STEPS, BATCH, WINDOW = 1500, 8, 320
RATE, WARMUP = 4e-3, 50

TEMPLATE = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte: OpenAI's byte-level alphabet (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    shifted = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(shifted)) for b in range(BYTES)]


def tokenizer() -> dict[str, object]:
    """A ``tokenizer.json``: a token per byte, token id = byte, and the special ones behind them."""
    added = [
        {
            "id": BYTES + i,
            "content": text,
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, text in enumerate(SPECIALS)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {char: byte for byte, char in enumerate(byte_alphabet())},
            "merges": [],
        },
    }


def documents() -> list[list[int]]:
    """The corpus as token ids, one list a document."""
    lines = [x for x in CORPUS.read_text(encoding="utf-8").splitlines() if x and not x.startswith("#")]
    found, at = [], 0
    user, assistant = BYTES + SPECIALS.index("<|user|>"), BYTES + SPECIALS.index("<|assistant|>")
    while at < len(lines):
        if lines[at].startswith("Q: "):
            question, answer = lines[at].removeprefix("Q: ").encode(), lines[at + 1].encode()
            found.append([user, *question, END, assistant, *answer, END])
            at += 2
        else:
            found.append([*lines[at].encode(), END])
            at += 1
    return found


def train() -> dict[str, torch.Tensor]:
    """Weights, float16, by Hugging Face's names."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    draw = random.Random(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    corpus = documents()
    for step in range(STEPS):
        rate = RATE * min(1.0, (step + 1) / WARMUP) * (1.0 - step / STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.tensor([_window(corpus, draw) for _ in range(BATCH)])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    state = model.state_dict()
    return {k: v.detach().half().contiguous() for k, v in state.items() if k != "lm_head.weight"}


def _window(corpus: list[list[int]], draw: random.Random) -> list[int]:
    """Documents in random order, the first from its beginning."""
    tokens: list[int] = []
    while len(tokens) < WINDOW:
        tokens += draw.choice(corpus)
    return tokens[:WINDOW]


def write(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """The Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "rope_theta": 10000.0,
        **CONFIG,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[1],
        "pad_token": SPECIALS[5],
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    for name, data in (
        ("config.json", config),
        ("tokenizer.json", tokenizer()),
        ("tokenizer_config.json", settings),
    ):
        text = json.dumps(data, indent=1, ensure_ascii=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def check(weights: dict[str, torch.Tensor]) -> int:
    """Hold new weights against those in the repository; the exit code."""
    there = load_file(TARGET / "model.safetensors")
    worst = max((there[k].float() - w.float()).abs().max().item() for k, w in weights.items())
    print("the same, bit for bit" if worst == 0 else f"weights differ by up to {worst:g}")
    return int(worst > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with what is there, write nothing")
    made = train()
    if parser.parse_args().check:
        sys.exit(check(made))
    write(TARGET, made)
