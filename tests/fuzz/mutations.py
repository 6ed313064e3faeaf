"""How valid input is damaged: bytes at random places, values and keys at random places of a structure."""

import copy
import json
import math

from hypothesis import strategies as st

HOSTILE = [
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, math.nan, math.inf, "", " ", "0", "\ud800", "\x00",
    "\x1b]0;x\x07\x9b2J\u202e", "../secret", "/etc/passwd", "a\u2028b\u0085c", "<|im_end|>", "${oc.env:HOME}", "{{ 9**9 }}",
    "evil/kernel", "x" * 5000, "[" * 5000, [], {}, [[]], [None], {"": {}}, {"__class__": "os.system"}, [[[[[[[[[[]]]]]]]]]],
]  # fmt: skip
SMALL = st.one_of(
    st.sampled_from(HOSTILE).map(copy.deepcopy),
    st.integers(-3, 300),
    st.text(max_size=12),
    st.lists(st.integers(0, 300), max_size=3),
)
NUMBERS = [value.to_bytes(size, "little") for size in (4, 8) for value in (0, 1, 2**31 - 1, 2**32 - 1)]
NUMBERS += [value.to_bytes(8, "little") for value in (2**40, 2**63 - 1, 2**63, 2**64 - 1)]


@st.composite
def spoilt_bytes(draw, valid):
    """`valid` with up to six runs of bytes changed, inserted, removed or doubled, or with its end cut off."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        run = draw(st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from(NUMBERS)))
        what = draw(st.sampled_from(["change", "insert", "delete", "double", "cut"]))
        if what == "change":
            data[place : place + len(run)] = run
        elif what == "insert":
            data[place:place] = run
        elif what == "delete":
            del data[place : place + len(run) ** 2]
        elif what == "double":
            data[place:place] = data[place : place + 64]
        else:
            del data[place:]
    return bytes(data)


@st.composite
def spoilt(draw, valid):
    """`valid`, a JSON structure, with up to four values or keys changed, added or removed."""
    content = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 4))):
        node, parent, key = content, None, None
        while isinstance(node, dict | list) and node and draw(st.integers(0, 5)):
            parent, key = node, draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            node = node[key]
        what = draw(st.sampled_from(["value", "remove", "rename", "add"]))
        if parent is None:
            content = draw(SMALL) if what == "value" else content
        elif what == "remove":
            del parent[key]
        elif what == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["", "auto_map", "x\ud800", "\x1b[2J", "../x", "\u2028"]))] = parent.pop(key)
        elif what == "add" and isinstance(node, dict):
            node[draw(st.text(max_size=6))] = draw(SMALL)
        else:
            parent[key] = draw(SMALL)
    return content


def spoilt_json(valid):
    """The bytes of a JSON text, damaged as a structure or, more rarely, as bytes."""
    as_text = spoilt(valid).map(lambda content: json.dumps(content).encode())
    return st.one_of(as_text, as_text, spoilt_bytes(json.dumps(valid).encode()))
