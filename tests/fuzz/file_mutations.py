"""Damage to the config, to safetensors headers and to files."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import CONFIG, INDEX, MANY, WEIGHTS, Draft
from tensor_mutations import about

# Config entries that say what the stored numbers mean: to change one may change the values.
MEANING = frozenset(
    {"checkpoint_format", "format", "version", "bits", "w_bit", "num_bits", "type"}
    | {"sym", "symmetric", "zero_point", "desc_act", "static_groups", "actorder"}
    | {"group_size", "q_group_size", "strategy", "meta", "dynamic", "quant_method", "config_groups"}
    | {"group_0", "weights", "schemes", "weight_type", "ordered", "packing_format"}
    | {"pack_method"}
)
# Entries that may make a planner see less: what is left must still be right.
SELECTION = frozenset(
    {"dynamic", "ignore", "targets", "modules_to_not_convert", "modules_in_block_to_quantize"}
    | {"llm_int8_skip_modules", "config_groups", "group_0", "modules", "exclude"}
)
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 8, 16, 7, 64, 2**31, 2**63, 2**70, -(2**63), 10**30),
    *(0.5, 4.0, 1e308, float("inf"), float("nan"), "", "4", "x", "re:[", "re:.*", "-:.*", "\x00"),
    *([], [None], [[]], ["Linear"], [1, 2], ["re:("], {}, {"x": {}}, {"": None}, {"-:[": {}}),
    *({"bits": 4}, {"+:.*": {"bits": 8}}, {"weights": None}, "\ud800", "é" * 40, "a" * 5000),
)
HEADER_DTYPES = ("F64", "F32", "I64", "I32", "U32", "I16", "U16", "U8", "I8", "BOOL", "F8_E4M3")
HEADER_DTYPES += ("F4", "C64", "F8_E8M0", "F6_E2M3", "X", "", "f16")


def _paths(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        found += _paths(inner, (*path, key))
    return found


def change_config(draft: Draft, rng: random.Random) -> None:
    """Delete, replace, rename or add one entry, of the quantization section above all."""
    paths = _paths(draft.config)
    inside = [path for path in paths if path[0] == "quantization_config" and len(path) > 1]
    path = rng.choice(inside if inside and rng.random() < 0.8 else paths)
    holder: Any = draft.config
    for key in path[:-1]:
        holder = holder[key]
    key, junk = path[-1], rng.choice(JUNK)
    action = rng.choice(("delete", "replace", "replace", "replace", "rename", "add"))
    if isinstance(holder, list) or action == "replace":
        holder[key] = junk
    elif action == "delete":
        del holder[key]
    elif action == "rename":
        holder[f"{key}_"] = holder.pop(key)
    else:
        key = rng.choice((*sorted(MEANING | SELECTION), "rotation", "kv_cache_scheme", "lm_head"))
        holder[key] = junk
    draft.log.append(f"config {action} {path} {junk!r:.60}")
    named = {part for part in (*path, key) if isinstance(part, str)}
    if named & MEANING:
        for module in draft.truths:
            draft.may_change(module)
    draft.may_lose_modules |= bool(named & SELECTION)
    draft.clues += [CONFIG, "quant", *named, *draft.truths, "self_attn", "mlp", "fuzz"]


def flip_config_bytes(draft: Draft, rng: random.Random) -> None:
    raw = _damaged(draft.serialized(CONFIG), rng)
    draft.files[CONFIG] = raw
    # A flipped key can be any key: only the kind of the outcome is known.
    draft.any_module, draft.may_lose_modules = MANY, True
    draft.clues += [CONFIG, "quant", "config", *draft.truths, "self_attn", "mlp", "fuzz"]


def replace_config(draft: Draft, rng: random.Random) -> None:
    good = draft.serialized(CONFIG)
    nested = b'{"quantization_config": ' + b'{"x":' * 50_000 + b"}" * 50_000 + b"}"
    variants = [b"", b"{}", b"[]", b"null", b"{", b"[" * 100_000, b"1" * 5000, nested]
    variants += [b"\xff\xfe" + good, b"\xef\xbb\xbf" + good, good + good]
    variants += [good.replace(b'"', b"'"), good.decode().encode("utf-16")]
    draft.files[CONFIG] = rng.choice(variants)
    draft.clues.append("fuzz")


def _damaged(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data))
        action = rng.choice(("flip", "flip", "byte", "insert", "delete"))
        if action == "flip":
            data[place] ^= 1 << rng.randrange(8)
        elif action == "byte":
            data[place] = rng.randrange(256)
        elif action == "insert":
            data.insert(place, rng.randrange(256))
        elif len(data) > 1:
            del data[place]
    return bytes(data)


def _split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def _join(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def change_header(draft: Draft, rng: random.Random) -> None:
    """Rewrite one header entry; the data stay where they are."""
    header, data = _split(draft.serialized(WEIGHTS))
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, other = header[name], header[rng.choice([n for n in header if n != "__metadata__"])]
    module = draft.module_of(name)

    def put(key: str, value: Any) -> None:
        entry[key] = value

    start, stop = entry["data_offsets"]
    shape = list(entry["shape"])
    actions: list[Callable[[], object]] = [
        lambda: put("dtype", rng.choice(HEADER_DTYPES)),
        lambda: put("dtype", rng.choice(JUNK)),
        lambda: put("shape", shape[::-1]),
        lambda: put("shape", [*shape, 1]),
        lambda: put("shape", [rng.choice(JUNK) for _ in shape]),
        lambda: put("shape", [0, 2**62]),
        lambda: put("shape", [size * 2 for size in shape]),
        lambda: put("shape", rng.choice(JUNK)),
        lambda: put("data_offsets", [start + 1, stop + 1]),
        lambda: put("data_offsets", [stop, start]),
        lambda: put("data_offsets", [-1, stop]),
        lambda: put("data_offsets", rng.choice(JUNK)),
        lambda: put("data_offsets", [2**63, 2**64]),
        lambda: put("data_offsets", other["data_offsets"]),
        lambda: put("data_offsets", [float(start), float(stop)]),
        lambda: put("x", rng.choice(JUNK)),
        lambda: entry.pop(rng.choice(list(entry))),
        lambda: header.pop(name),
        lambda: header.update({name: rng.choice(JUNK)}),
        lambda: header.update({f"{name}_": dict(entry)}),
        lambda: header.update({"__metadata__": rng.choice(JUNK)}),
        lambda: header.update({"__metadata__": {"format": rng.choice(JUNK)}}),
        lambda: header.update({"\ud800": dict(entry)}),
    ]
    rng.choice(actions)()
    raw = json.dumps(header, allow_nan=True).encode("utf-8", "surrogatepass")
    draft.files[WEIGHTS] = _join(raw, data)
    if module in draft.truths:
        about(draft, module, WEIGHTS)
        # Bytes of another type or of a neighbour of the same size are not told from the right ones
        draft.may_change(module)
    else:
        draft.clues += [WEIGHTS, module, *draft.truths]


def swap_header_entries(draft: Draft, rng: random.Random) -> None:
    header, data = _split(draft.serialized(WEIGHTS))
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.choice(names), rng.choice(names)
    header[a], header[b] = header[b], header[a]
    draft.files[WEIGHTS] = _join(json.dumps(header).encode(), data)
    for name in (a, b):
        module = draft.module_of(name)
        if module in draft.truths:
            draft.may_change(module)
        about(draft, module, WEIGHTS)


def reformat_header(draft: Draft, rng: random.Random) -> None:
    """The same header in another spelling: it must load alike or be refused."""
    header, data = _split(draft.serialized(WEIGHTS))
    text = json.dumps(header)
    variants: list[bytes] = [
        text.encode() + b" " * rng.randrange(64),
        b" " + text.encode(),
        b"\n" + text.encode(),
        b"\xef\xbb\xbf" + text.encode(),
        json.dumps(header, indent=3).encode(),
        json.dumps(header, sort_keys=True).encode(),
        text.replace("scales", "\\u0073cales").encode(),
        (text[:-1] + "," + text[1:]).encode(),
        (text[:-1] + ",}").encode(),
        text.replace(", ", " , ").encode("utf-16"),
        text.encode() + b"\x00\x00",
        text.encode() + b"{}",
        text.replace('"dtype"', '"dtype": "I32", "dtype"', 1).encode(),
        text.replace("{", '{"x": ' + "[" * 3000 + "]" * 3000 + ",", 1).encode(),
    ]
    draft.files[WEIGHTS] = _join(rng.choice(variants), data)
    draft.clues.append(WEIGHTS)


def damage_header_bytes(draft: Draft, rng: random.Random) -> None:
    raw = draft.serialized(WEIGHTS)
    size = 8 + struct.unpack("<Q", raw[:8])[0]
    draft.files[WEIGHTS] = _damaged(raw[:size], rng) + raw[size:]
    # A flipped name can be any name, of one tensor for each damaged byte
    draft.any_module, draft.may_lose_modules = MANY, True
    draft.clues += [WEIGHTS, "model", "self_attn", "mlp", "head", "fuzz"]


def damage_data_bytes(draft: Draft, rng: random.Random) -> None:
    """One byte of the data lies in one tensor."""
    raw = bytearray(draft.serialized(WEIGHTS))
    size = 8 + struct.unpack("<Q", raw[:8])[0]
    place = rng.randrange(size, len(raw))
    raw[place] ^= 1 << rng.randrange(8)
    draft.files[WEIGHTS] = bytes(raw)
    draft.any_module += 1
    draft.clues += list(draft.truths)


def resize_file(draft: Draft, rng: random.Random) -> None:
    raw = draft.serialized(WEIGHTS)
    cut = rng.choice((0, 1, 7, 8, 9, len(raw) // 2, len(raw) - 1, rng.randrange(len(raw))))
    longer = raw + bytes(rng.randrange(1, 100))
    length = rng.choice((0, 1, 2**32, 2**60, 2**64 - 1, len(raw), 100_000_001))
    other_length = struct.pack("<Q", length) + raw[8:]
    draft.files[WEIGHTS] = rng.choice((raw[:cut], raw[:cut], longer, other_length))
    draft.clues.append(WEIGHTS)


def change_index(draft: Draft, rng: random.Random) -> None:
    """Name the tensors' file in an index, wrongly."""
    header, _ = _split(draft.serialized(WEIGHTS))
    names = [name for name in header if name != "__metadata__"]
    good = dict.fromkeys(names, WEIGHTS)
    name = rng.choice(names)
    weight_map: list[Any] = [
        good,
        {**good, name: "other.safetensors"},
        {**good, name: "../model.safetensors"},
        {**good, name: rng.choice(JUNK)},
        {**good, "x.weight": WEIGHTS},
        {key: value for key, value in good.items() if key != name},
        rng.choice(JUNK),
    ]
    index: Any = {"metadata": rng.choice(JUNK), "weight_map": rng.choice(weight_map)}
    raw = json.dumps(rng.choice((index, index, index, rng.choice(JUNK)))).encode()
    draft.files[INDEX] = rng.choice((raw, raw, raw, raw[: len(raw) // 2]))
    draft.clues += [INDEX, name]


def change_files(draft: Draft, rng: random.Random) -> None:
    """Files that are missing, doubled, folders or links to nowhere."""
    name = rng.choice((WEIGHTS, CONFIG))

    def remove(path: Path) -> None:
        (path / name).unlink()

    def folder(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    def dangling(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to("nowhere")

    def loop(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to(name)

    def doubled(path: Path) -> None:
        (path / "model-2.safetensors").write_bytes((path / WEIGHTS).read_bytes())

    def empty_beside(path: Path) -> None:
        (path / "z.safetensors").write_bytes(b"")

    draft.after.append(rng.choice((remove, folder, dangling, loop, doubled, empty_beside)))
    draft.clues += ["fuzz", "safetensors", CONFIG]
