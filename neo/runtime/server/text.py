"""A model's tokenizer and chat template, as its folder has them; nothing is fetched from a network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from neo.core.errors import InputError


class TextSide:
    """Text to tokens and back. Raises InputError if ``folder`` has no tokenizer that can be used."""

    def __init__(self, folder: Path) -> None:
        self._transformers = _load(folder)
        self.tokenizer: Tokenizer = self._transformers.backend_tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; ``special``: with what the tokenizer puts around a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of token ids; ids the tokenizer does not know are left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token(self, token: int) -> str:
        """Text of one token, special ones included."""
        return self.decode([token])

    def chat(self, messages: list[dict[str, Any]], *, generate: bool, resume: bool) -> list[int]:
        """Token ids of a conversation by the model's chat template.

        ``generate``: end with what opens the assistant's turn; ``resume``: leave the last message open.
        Raises InputError if there is no template or it refuses these messages.
        """
        if not self._transformers.chat_template:
            raise InputError("the model's tokenizer has no chat template; use /v1/completions")
        try:
            text = self._transformers.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate, continue_final_message=resume
            )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(f"the model's chat template refuses these messages: {error}") from error
        return self.encode(text, special=False)


def _load(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about itself
        from transformers import PreTrainedTokenizerFast

        logging.getLogger("transformers").setLevel(logging.ERROR)
        try:
            # As it stands in tokenizer.json. AutoTokenizer loads every model class to come to the same.
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever is wrong with a folder: transformers raises anything
            lacks = "" if (folder / "tokenizer.json").is_file() else "it has no tokenizer.json: "
            why = " ".join(str(error).split())[:300]
            raise InputError(
                f"{folder}: no usable tokenizer ({lacks}{why}); name one with --tokenizer"
            ) from error
