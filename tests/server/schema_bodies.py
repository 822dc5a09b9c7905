"""Bodies out of an OpenAPI description: what it allows, and then broken at random places. Seeded, fast."""

from __future__ import annotations

import json
import random
from typing import Any

Json = Any
_DEEPEST = 5
_WHOLE = (0, 1, -1, 2, 7, 264, 2**31, -(2**31), 2**63, 2**64, 10**40)
_REAL = (0.0, -0.0, 0.5, 1.0, -1.0, 2.5, 1e-300, 1e308, -1e308)
_TEXTS = (
    "",
    "a",
    "Once upon",
    "\x00",
    "\ud800",
    "☃" * 9,
    "é́",
    "a" * 300,
    "<|end|>",
    "{{7*7}}",
    "${x}",
    "-1",
    "NaN",
)
_ANY: tuple[Json, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    "",
    "a",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {}},
)


class Bodies:
    """Draws JSON values for schemas.

    Args:
        description: the OpenAPI document; ``$ref`` is looked up in it.
        seed: of everything drawn.
        wrong: chance, at every place, of a value that the schema may not allow.
    """

    def __init__(self, description: Json, seed: int, wrong: float = 0.08) -> None:
        self._description = description
        self._draw = random.Random(seed)
        self._wrong = wrong

    def value(self, schema: Json, depth: int = 0) -> Json:
        """A value for a schema, or something else."""
        draw = self._draw
        if draw.random() < self._wrong or depth > _DEEPEST:
            return draw.choice(_ANY)
        schema = self._resolved(schema)
        if "anyOf" in schema:
            return self.value(draw.choice(schema["anyOf"]), depth + 1)
        if "enum" in schema or "const" in schema:
            return draw.choice(schema.get("enum") or [schema["const"]])
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            most = 3 if depth else 20
            return [self.value(schema.get("items", {}), depth + 1) for _ in range(draw.randrange(most))]
        if kind == "string":
            return draw.choice(_TEXTS)
        if kind == "integer":
            return draw.choice(_WHOLE) if draw.random() < 0.3 else draw.randrange(1, 40)
        if kind == "number":
            return draw.choice(_REAL)
        if kind == "boolean":
            return draw.random() < 0.5
        return None if kind == "null" else draw.choice(_ANY)

    def _resolved(self, schema: Json) -> Json:
        while "$ref" in schema:
            found = self._description
            for part in schema["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            schema = found
        return schema

    def _object(self, schema: Json, depth: int) -> Json:
        draw, found = self._draw, {}
        required = schema.get("required", ())
        for name, of in schema.get("properties", {}).items():
            if draw.random() < (0.97 if name in required else 0.15):
                found[name] = self.value(of, depth + 1)
        more = schema.get("additionalProperties")
        if isinstance(more, dict):
            found |= {draw.choice(_TEXTS): self.value(more, depth + 1) for _ in range(draw.randrange(3))}
        if draw.random() < self._wrong:
            found[draw.choice(_TEXTS)] = draw.choice(_ANY)
        return found

    def body(self, schema: Json) -> bytes:
        """The bytes of a body; now and then broken below the level of JSON."""
        draw = self._draw
        data = json.dumps(self.value(schema), ensure_ascii=draw.random() < 0.5).encode(
            "utf-8", "surrogatepass"
        )
        if draw.random() < 0.15:
            at = draw.randrange(len(data) + 1)
            junk = draw.choice((b"", b"\xff", b"\x00", b"{", b"]" * 50, b"NaN", b'"', b"[" * 2000, b"1e999"))
            data = data[:at] + junk + data[at + draw.randrange(4) :]
        return data
