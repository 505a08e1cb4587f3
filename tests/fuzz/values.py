"""Values of every kind that a file can hold, the awkward ones more often than chance would."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

AWKWARD = [
    "", " ", "\n", "\x00", "\ufeff", "\ud800", "a\udfffb", "\u202e", "𝕏", "é", "e\u0301",
    "<|im_end|>", "<|im_start|>user\n", "\n\nHuman: a", "\n\nAssistant: b", "\n\nHuman:", "\r\n",
    '"', "{{ x }}",
    "user", "assistant", "system", "null", "NaN", "1e999", "../..", "/etc/passwd", "~", "a" * 300,
    "long " * 2000,
]  # fmt: skip

any_character = st.characters(exclude_categories=())  # lone surrogates too
texts = st.one_of(
    st.sampled_from(AWKWARD),
    st.text(any_character, max_size=12),
    st.text("abc ", min_size=1, max_size=8),
)
numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, -(2**63), 2**64, 10**40, 10**400, 0.5, -0.0]),
    st.floats(allow_nan=True, allow_infinity=True),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)
        ),
        max_leaves=6,
    )


anything = nested(scalars)


@st.composite
def deep(draw: st.DrawFn) -> Any:
    """A list in a list in a list: around the depth at which Python's own limits begin."""
    value: Any = draw(scalars)
    for _ in range(draw(st.sampled_from([50, 490, 900, 985]))):
        value = [value]
    return value


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with some of them cut, changed, doubled or put in."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(result)))
        kind = draw(st.sampled_from(["cut", "change", "insert", "remove", "double"]))
        if kind == "cut":
            del result[at:]
        elif kind == "change" and at < len(result):
            result[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            odd = [b"\x00", b"\xff", b'"', b"{", b"]", b"\n", b",", b"\xef\xbb\xbf", b"\\ud800"]
            result[at:at] = draw(st.one_of(st.sampled_from(odd), st.binary(max_size=8)))
        elif kind == "remove":
            del result[at : at + draw(st.integers(1, 20))]
        else:
            end = min(len(result), at + draw(st.integers(1, 40)))
            result[at:at] = result[at:end]
    return bytes(result)
