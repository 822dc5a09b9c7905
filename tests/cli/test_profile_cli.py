"""``neo profile`` as a user meets it: its files serve the other commands, its errors are one line."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the engine needs torch")

from tiny_toml import TINY_TOML

from neo.cli import main
from neo.cost.presets import load_hardware
from neo.report.files import read_summary

SMALL = ["--kv-gpu-blocks", "8", "--kv-cpu-blocks", "80", "--max-seqs", "8", "--max-batch-tokens", "32"]

Neo = Callable[..., tuple[int, str, str]]


@pytest.fixture
def neo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Neo]:
    """Run a command line: exit code, standard output, standard error."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["neo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.toml"
    path.write_text(TINY_TOML)
    return str(path)


def test_the_table_serves_simulate_bench_and_validate(
    neo: Neo, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "here"
    code, shown, errors = neo("profile", "--model", model, *SMALL, "--quick", "--out", out)
    assert (code, errors) == (0, "")
    assert "tiny on" in shown
    assert "cpu_attn" in shown
    assert "repeats, spread" in shown
    assert sorted(p.name for p in out.iterdir()) == ["cost.json", "hardware.toml"]
    about = json.loads((out / "cost.json").read_text())["provenance"]
    assert about["command"].startswith("neo profile --model tiny.toml --kv-gpu-blocks 8")
    assert str(tmp_path) not in (out / "cost.json").read_text()
    assert load_hardware(str(out / "hardware.toml")).name == about["hardware"]

    table = ["--cost", f"profiled:{out / 'cost.json'}", "--hardware", out / "hardware.toml"]
    load = ["--prompt-lengths", "uniform:1:60", "--output-lengths", "uniform:1:9", "--requests", "9"]
    common = ["--model", model, *SMALL, *table, *load, "-p", "neo", "--quiet", "--no-plots"]
    for command, run in (("simulate", "simulated"), ("bench", "measured")):
        code, _, errors = neo(command, *common, "--out", tmp_path / run)
        assert code == 0, errors
        assert "raised" not in errors
        assert "Traceback" not in errors
        assert read_summary(tmp_path / run)["kind"] == run
    code, shown, errors = neo("validate", tmp_path / "measured")
    assert code == 0, shown + errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "stories42"], "stories42"),
        (["--dtype", "int9"], "dtype 'int9' is not one of"),
        (["--policy", "ne"], "unknown policy 'ne'"),
        (["--policy-opt", "eager"], "--policy-opt eager: expected key=value"),
        (["--policy-opt", "hungry=1"], "hungry"),
        (["--block-size", "12"], "--block-size 12: the kernels take 8, 16, 32"),
        (["--kv-gpu-blocks", "1"], "at least 2 GPU KV blocks of 16 tokens, not 1"),
        (["--kv-gpu-bytes", "1GB"], "give one"),
        (["--kv-cpu-blocks", "900000000"], "are available"),
        (["--cpu-cores", "zero"], "--cpu-cores zero: expected core numbers"),
        (["--load-format", "safetensors"], "tiny.toml"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    neo: Neo, model: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, out, errors = neo(
        "profile", "--model", model, *SMALL, "--quick", "--out", tmp_path / "o", *arguments
    )
    assert (code, out) == (2, "")
    assert message in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_where_nothing_can_be_written(neo: Neo, model: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, errors = neo(
        "profile", "--model", model, *SMALL, "--quick", "--quiet", "--out", tmp_path / "file"
    )
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert (tmp_path / "file").read_text() == ""


def test_a_checkpoint_that_is_damaged(neo: Neo, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="its files are made with transformers")
    folder = tmp_path / "model"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "float32",
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x10\x00")
    code, _, errors = neo("profile", "--model", folder, *SMALL, "--out", tmp_path / "o")
    assert code == 2
    assert f"checkpoint {folder / 'model.safetensors'}: " in errors
    assert "cut off or damaged" in errors
    assert errors.count("\n") == 1
