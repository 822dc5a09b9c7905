"""The official client, unchanged, against a server that runs; and the bodies that benchmark clients send."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("openai", reason="its client is what is tested")

import openai
from serving import DEVICE, MODEL, Served, stream_of

from neo import __version__
from neo.runtime import tiny
from neo.runtime.engine_config import EngineConfig
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.setup import EngineParts

QUESTION = [{"role": "user", "content": "What is a KV cache?"}]
ANSWER = (
    "A KV cache holds the keys and values of all tokens so far, "
    "so that each step computes only the newest token."
)


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).max_model_len == 2048
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    (choice,) = answer.choices
    assert choice.message.content == ANSWER
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens == len(ANSWER) + 1  # a token a byte, and the end
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream_gives_the_same_text(client: Any) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(c.choices[0].delta.content for c in chunks) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * len(ANSWER)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.completion_tokens == len(chunks) == len(ANSWER) + 1


def test_characters_of_many_bytes_come_whole(client: Any) -> None:
    asked = [{"role": "user", "content": [{"type": "text", "text": "Say hello in other languages."}]}]
    stream = client.chat.completions.create(model=MODEL, messages=asked, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert "こんにちは" in "".join(pieces)
    assert "👋" in pieces
    assert not any("�" in piece for piece in pieces)


def test_completions_of_every_kind_of_prompt(client: Any, server: Served) -> None:
    text = "Once upon a time"
    ids = list(text.encode())
    wanted = client.completions.create(model=MODEL, prompt=text, temperature=0, max_tokens=20).choices[0].text
    assert wanted == " there was a small m"
    for prompt in (ids, [text, text], [ids, ids], [text, ids]):
        answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=20)
        assert {c.text for c in answer.choices} == {wanted}
        assert [c.index for c in answer.choices] == list(range(len(answer.choices)))
    echoed = client.completions.create(
        model=MODEL, prompt=[text, ids], temperature=0, max_tokens=20, echo=True
    )
    assert {c.text for c in echoed.choices} == {text + wanted}
    assert len(client.completions.create(model=MODEL, prompt=text).choices[0].text.encode()) <= 16


def test_bytes_that_are_no_character_at_the_end_are_in_both_kinds_of_answers(server: Served) -> None:
    body: dict[str, Any] = {"prompt": "a", "temperature": 0, "logit_bias": {str(0xE2): 100}}
    for count in (1, 2, 18, 40):
        (whole,) = server.complete(**body, max_tokens=count)["choices"]
        chunks = stream_of(server.post("/v1/completions", **body, max_tokens=count, stream=True))
        assert len(chunks) == count
        assert "".join(c["choices"][0]["text"] for c in chunks) == whole["text"] == "\ufffd" * count
    for stop, text in (("\ufffd\ufffd", ""), ("\ufffd\ufffd\ufffd", "\ufffd\ufffd")):
        (choice,) = server.complete(**body, max_tokens=2, stop=stop)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, "stop" if not text else "length")


def test_stop_strings_and_stop_tokens(client: Any, server: Served) -> None:
    base = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 50}
    (choice,) = client.completions.create(**base, stop=["smell", "small", "repo"]).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (" there was a ", "stop", "small")
    with client.completions.create(**base, stop="small", stream=True) as stream:
        assert "".join(c.choices[0].text for c in stream) == " there was a "
    for more, text in (
        ({"include_stop_str_in_output": True, "stop": "small"}, " there was a small"),
        ({"stop_token_ids": [ord("w")]}, " there "),
        ({"stop": "e", "min_tokens": 7}, " there was a small mod"),
    ):
        (choice,) = server.complete(**base, **more)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    server.wait_until_empty()


def test_several_choices_differ_and_repeat_with_their_seed(client: Any) -> None:
    asked = {"model": MODEL, "prompt": "Zz", "n": 3, "seed": 7, "temperature": 2.0, "max_tokens": 24}
    texts = [c.text for c in client.completions.create(**asked).choices]
    assert len(set(texts)) == 3
    assert texts == [c.text for c in client.completions.create(**asked).choices]
    streamed = ["", "", ""]
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_logprobs_of_both_kinds(client: Any) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once", temperature=0, max_tokens=5, logprobs=3)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text == " upon"
    assert found.text_offset == [0, 1, 2, 3, 4]
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert logprob == top[token] == max(top.values()) <= 0
        assert len(top) <= 3
    chat = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=4, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert [c.token for c in content] == list("A KV")
    assert all(len(c.top_logprobs) == 2 and c.bytes == list(c.token.encode()) for c in content)
    plain = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=4, logprobs=True
    )
    assert plain.choices[0].logprobs.content[0].top_logprobs == []


def test_errors_name_the_field(client: Any) -> None:
    base = {"model": MODEL, "prompt": "a"}
    for more, param in (
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"prompt": [1, 999]}, "prompt"),
        ({"prompt": [[1], [-(10**30)]], "echo": True}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 2048}, "prompt"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"best_of": 5}, "best_of"),
        ({"suffix": "b"}, "suffix"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"extra_body": {"priority": 2**40}}, "priority"),
        ({"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"max_tokens": 4, "extra_body": {"min_tokens": 5}}, "min_tokens"),
        ({"extra_body": {"min_tokens": 17}}, "min_tokens"),  # a completion has 16 by itself
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{**base, **more})
        assert caught.value.param == param, caught.value.message
        assert param in caught.value.message
    for more, param in (
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [*QUESTION, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "tool_calls": [{}]}]}, "messages[0].content"),
        ({"messages": [*QUESTION, {"role": "assistant", "tool_calls": []}]}, "messages[1].content"),
        ({"max_completion_tokens": 4, "extra_body": {"min_tokens": 5}}, "min_tokens"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **more})
        assert caught.value.param == param
        assert param in caught.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-7", prompt="a")
    assert missing.value.param == "model"


def test_an_assistant_that_called_tools_may_have_said_nothing(client: Any, server: Served) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    spoken: list[Any] = [{"role": "assistant", "content": "", "tool_calls": [call]}, *QUESTION]
    silent: list[Any] = [{"role": "assistant", "tool_calls": [call]}, *QUESTION]
    lengths = [server.post("/tokenize", messages=m).json()["count"] for m in (spoken, silent)]
    assert lengths[0] == lengths[1]
    assert client.chat.completions.create(model=MODEL, messages=silent, max_tokens=2).choices
    refused = server.post("/tokenize", messages=[{"role": "user"}])
    assert refused.json()["error"]["param"] == "messages[0].content"


def test_lengths_are_capped_by_the_context(server: Served) -> None:
    (choice,) = server.complete(prompt="a" * 2040, max_tokens=10**9, ignore_eos=True)["choices"]
    assert choice["finish_reason"] == "length"
    short = {"prompt": "a" * 2040, "max_tokens": 99, "min_tokens": 99, "temperature": 0}
    (choice,) = server.complete(**short)["choices"]  # what is cut to the context takes min_tokens with it
    assert choice["finish_reason"] == "length"
    answer = server.post("/v1/completions", prompt="a" * 2048)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_tokenize_and_detokenize(server: Served) -> None:
    answer = server.post("/tokenize", prompt="hé", return_token_strs=False).json()
    assert answer == {"count": 3, "max_model_len": 2048, "tokens": [104, 195, 169], "token_strs": None}
    assert server.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": "hé"}
    chat = server.post("/tokenize", messages=QUESTION).json()
    assert chat["count"] == len("What is a KV cache?") + 3
    assert server.post("/tokenize").json()["error"]["param"] == "prompt"
    assert server.post("/detokenize", tokens=[999]).json()["error"]["param"] == "tokens"


def test_the_other_endpoints_through_the_client(client: Any, server: Served) -> None:
    root = client.with_options(base_url=server.url)
    asked = {"model": MODEL, "prompt": "hé"}
    tokens = root.post("/tokenize", cast_to=object, body=asked)["tokens"]
    assert tokens == [104, 195, 169]
    text = root.post("/detokenize", cast_to=object, body={"model": MODEL, "tokens": tokens})
    assert text == {"prompt": "hé"}
    assert root.get("/health", cast_to=object) == {"status": "ok"}
    assert root.get("/version", cast_to=object)["version"] == __version__
    assert "neo:num_requests_running" in root.get("/metrics", cast_to=str)


def test_every_endpoint_is_in_the_description(server: Served) -> None:
    described = server.http.get("/openapi.json").json()["paths"]
    assert {f"{method} {path}" for path, methods in described.items() for method in methods} == {
        *("post /v1/completions", "post /v1/chat/completions", "post /tokenize", "post /detokenize"),
        *("get /v1/models", "get /v1/models/{name}", "get /health", "get /metrics", "get /version"),
    }


BENCHMARKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vllm bench serve, completions": (
        "/v1/completions",
        {"prompt": "abc", "best_of": 1, "repetition_penalty": 1.0, "temperature": 0.0, "max_tokens": 8}
        | {"logprobs": None, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True},
    ),
    "vllm bench serve, chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "abc"}]}], "temperature": 0.0}
        | {"max_completion_tokens": 8, "stream": True, "stream_options": {"include_usage": True}}
        | {"ignore_eos": True},
    ),
    "sglang bench_serving": (
        "/v1/completions",
        {"prompt": "abc", "temperature": 0.0, "best_of": 1, "max_tokens": 8, "stream": True}
        | {"ignore_eos": True, "stream_options": {"include_usage": True}},
    ),
    "guidellm": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "abc"}], "stop": None, "ignore_eos": True, "stream": True}
        | {"max_tokens": 8, "max_completion_tokens": 8}
        | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "aiperf": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "abc", "name": "x"}], "stream": True, "min_tokens": 8}
        | {"max_completion_tokens": 8, "ignore_eos": True, "stream_options": {"include_usage": True}},
    ),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_benchmark_clients_send_and_read(server: Served, name: str) -> None:
    path, body = BENCHMARKS[name]
    answer = server.http.post(path, json={"model": MODEL, "an_unknown_field": [1], **body})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = stream_of(answer)
    assert len(chunks) == 8
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    continuous = body["stream_options"].get("continuous_usage_stats")
    seen = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert seen == (list(range(1, 9)) if continuous else [None] * 8)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert isinstance(choice["text"] if "text" in choice else choice["delta"]["content"], str)
    without = {k: v for k, v in body.items() if k != "stream_options"}
    assert all(c["choices"] and "usage" not in c for c in stream_of(server.post(path, **without)))


def test_tokens_equal_those_of_the_engine_in_process_under_concurrency(server: Served) -> None:
    cases = [
        (
            list(f"Prompt number {i}: ".encode()) * (1 + i % 4),
            {"temperature": (0.0, 0.7, 1.5)[i % 3], "seed": i, "max_tokens": 12 + i, "top_p": 0.9},
        )
        for i in range(24)
    ]
    parts = EngineParts(
        EngineConfig(str(tiny.FOLDER), kv_gpu_blocks=512, kv_cpu_blocks=512, gpu_threads=1, device=DEVICE)
    )
    engine = parts.engine(parts.system())
    expected: dict[str, list[int]] = {}
    for i, (ids, params) in enumerate(cases):
        engine.add(str(i), ids, SamplingParams(ignore_eos=True, **params))
    while engine.has_work:
        for output in engine.step():
            if output.token is not None:
                expected.setdefault(output.request_id, []).append(output.token)
    engine.close()
    server.post("/v1/completions", prompt="warm")

    def text_of(i: int) -> str:
        ids, params = cases[i]
        body = {"prompt": ids, "ignore_eos": True, "skip_special_tokens": False, **params}
        if i % 2:
            found: str = server.complete(**body)["choices"][0]["text"]
            return found
        answer = server.post("/v1/completions", stream=True, **body)
        return "".join(chunk["choices"][0]["text"] for chunk in stream_of(answer))

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(text_of, range(len(cases))))
    for i, text in enumerate(texts):
        tokens = expected[str(i)]
        whole = server.post("/detokenize", tokens=tokens).json()["prompt"]
        assert text == whole, i
