"""Text as it comes: whole characters, nothing behind a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers", reason="text is made by tokenizers")

import tokenizers

from neo.runtime import tiny
from neo.runtime.server.detokenize import Detokenizer, StopStrings

TOKENIZER = tokenizers.Tokenizer.from_file(str(tiny.FOLDER / "tokenizer.json"))
texts = st.text(
    st.characters(exclude_categories=["Cs"]) | st.just("\ufffd"), max_size=60
)  # U+FFFD often: to the library it looks like bytes that are no character yet


@settings(max_examples=100)
@given(texts, texts)
def test_streamed_text_is_the_whole_text_in_whole_characters(prompt: str, text: str) -> None:
    decode = Detokenizer(TOKENIZER, list(prompt.encode()))
    shown = ""
    for byte in text.encode():
        shown += decode.push(byte)
        assert text.startswith(shown)
    assert shown + decode.flush() == text
    assert decode.flush() == ""


def test_a_replacement_character_is_held_back_until_more_comes_or_the_end() -> None:
    for more, rest in (("", "\ufffd"), ("b", "")):
        decode = Detokenizer(TOKENIZER, [65])
        assert "".join([decode.push(byte) for byte in "a\ufffd".encode()]) == "a"
        assert [decode.push(byte) for byte in more.encode()] == ["\ufffdb"] * len(more)
        assert decode.flush() == rest
        assert decode.flush() == ""


def test_many_replacement_characters_are_not_cut_in_two() -> None:
    decode = Detokenizer(TOKENIZER, [])
    shown = "".join([decode.push(byte) for byte in ("\ufffd" * 100).encode()])
    assert len(shown) > 90
    assert shown + decode.flush() == "\ufffd" * 100


def test_a_character_that_is_not_whole_at_the_end_is_shown_as_such() -> None:
    decode = Detokenizer(TOKENIZER, [65])
    assert [decode.push(byte) for byte in "b☃".encode()[:-1]] == ["b", "", ""]
    assert decode.flush() == "\ufffd"


@settings(max_examples=100)
@given(st.lists(st.integers(0, 263) | st.sampled_from("☃\ufffd👋".encode()), max_size=200), st.booleans())
def test_any_tokens_become_the_text_that_they_are_together(tokens: list[int], skip: bool) -> None:
    decode = Detokenizer(TOKENIZER, [], skip)
    shown = "".join([decode.push(t) for t in tokens]) + decode.flush()
    assert shown == TOKENIZER.decode(tokens, skip_special_tokens=skip)


def test_bytes_that_are_no_character_are_not_held_back_for_ever() -> None:
    decode = Detokenizer(TOKENIZER, [65])
    shown = "".join([decode.push(0xFF) for _ in range(100)])
    assert len(shown) > 50
    assert decode.push(ord("a")).endswith("a")


def test_a_prompt_that_ends_inside_a_character_can_be_continued() -> None:
    snowman = "☃".encode()
    decode = Detokenizer(TOKENIZER, [65, snowman[0]])
    pieces = [decode.push(b) for b in [*snowman[1:], 66, 67]]
    assert "".join(pieces).endswith("BC")


@settings(max_examples=300)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=1),
    st.booleans(),
)
def test_stop_strings_however_the_text_is_cut(
    text: str, stops: list[str], sizes: list[int], include: bool
) -> None:
    found = [(text.find(s), s) for s in stops if s in text]
    watch, shown, met, at = StopStrings(stops, include), "", None, 0
    while at < len(text) and met is None:
        size = sizes[at % len(sizes)]
        more, met = watch.push(text[at : at + size])
        shown += more
        at += size
        # What is out can no longer become part of a stop string.
        assert text.startswith(shown)
        assert met is not None or not any(s in shown for s in stops)
    if not found:
        assert met is None
        assert shown + watch.flush() == text
        return
    assert met is not None
    before = text.find(met)
    assert shown == (text[: before + len(met)] if include else text[:before])


def test_the_first_stop_string_counts_and_a_beginning_is_held_back() -> None:
    watch = StopStrings(["END", "\n\n"])
    assert watch.push("a E") == ("a ", None)
    assert watch.push("N") == ("", None)
    assert watch.push("x\n") == ("ENx", None)
    assert watch.push("\nEND") == ("", "\n\n")
