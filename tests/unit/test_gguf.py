"""The GGUF reader against the gguf package, and against files that are not what they claim."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.errors import CheckpointError, UnsupportedModel
from headrace.weights.gguf import MAX_DEPTH, READ_TYPES, GGUFFile

Types = gguf.GGMLQuantizationType
PATIENCE_S = 3.0
"""Seconds in which any bad file is refused, on a busy machine too."""
U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


# ---------------------------------------------------------------- files written by the gguf package


def write_library(path: Path, alignment: int = 32) -> dict[str, np.ndarray]:
    """One tensor of every type the package can write, and one key of every value type. Returns the tensors' bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for kind, value in (
        *(("uint8", 200), ("int8", -3), ("uint16", 60_000), ("int16", -300), ("uint32", 2**32 - 1), ("int32", -7)),
        *(("uint64", 2**64 - 1), ("int64", -(2**62)), ("float32", 0.1), ("float64", 0.1), ("bool", True)),
        ("string", "naïve ▁Ġ"),
    ):
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    for key, values in (
        *(("ints", [1, -2, 3]), ("floats", [0.5, 1.5]), ("bools", [True, False]), ("tokens", ["a", "", "ü", "\n"])),
        ("nested", [[1, 2], [3]]),
    ):
        writer.add_array(f"x.{key}", values)
    rng = np.random.default_rng(0)
    made = {
        "f32.2d": rng.standard_normal((3, 5)).astype(np.float32),
        "f16.3d": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "f32.1d": rng.standard_normal(7).astype(np.float32),
        "ids": np.arange(4, dtype=np.int32),
    }
    for name, array in made.items():
        writer.add_tensor(name, array)
    for kind in (Types.BF16, Types.Q4_0, Types.Q4_1, Types.Q8_0, Types.Q5_0, Types.Q5_1, Types.TQ2_0):
        made[kind.name] = gguf.quants.quantize(rng.standard_normal((4, 256)).astype(np.float32), kind)
        writer.add_tensor(kind.name, made[kind.name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@pytest.mark.parametrize("alignment", [32, 8, 256])
def test_a_file_of_the_library(tmp_path: Path, alignment: int) -> None:
    made = write_library(tmp_path / "x.gguf", alignment)
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.names == tuple(made)
    assert file.nbytes == sum(array.nbytes for array in made.values())
    for name, array in made.items():
        quantised = name.isupper()
        assert file.shape(name) == ((4, 256) if quantised else array.shape)
        kind = Types[file.type_name(name)]
        assert file.raw(name).tobytes() == array.tobytes()
        if kind.name in READ_TYPES:
            expected = gguf.quants.dequantize(array, kind) if quantised else array.astype(np.float32)
            assert np.array_equal(file.tensor(name).dequantise(), expected)
    with pytest.raises(UnsupportedModel, match=r"'TQ2_0' is TQ2_0, supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1"):
        file.tensor("TQ2_0")
    with pytest.raises(UnsupportedModel, match="'ids' is I32"):
        file.tensor("ids")


def test_every_value_type_is_read(tmp_path: Path) -> None:
    write_library(tmp_path / "x.gguf")
    found = GGUFFile(tmp_path / "x.gguf").metadata
    assert {key: found[f"x.{key}"] for key in ("uint8", "int8", "uint16", "int16", "uint32", "int32")} == {
        "uint8": 200, "int8": -3, "uint16": 60_000, "int16": -300, "uint32": 2**32 - 1, "int32": -7,
    }  # fmt: skip
    assert (found["x.uint64"], found["x.int64"]) == (2**64 - 1, -(2**62))
    assert (found["x.float32"], found["x.float64"]) == (float(np.float32(0.1)), 0.1)
    assert found["x.bool"] is True and found["general.architecture"] == "llama"
    assert (found["x.string"], found["x.tokens"]) == ("naïve ▁Ġ", ["a", "", "ü", "\n"])
    assert {type(found[f"x.{key}"]) for key in ("uint8", "float32", "string")} == {int, float, str}
    for key, dtype, values in (
        ("ints", np.int32, [1, -2, 3]),
        ("floats", np.float32, [0.5, 1.5]),
        ("bools", np.bool_, [True, False]),
    ):
        array = found[f"x.{key}"]
        assert isinstance(array, np.ndarray) and array.dtype == dtype and array.tolist() == values
    nested = found["x.nested"]
    assert isinstance(nested, list) and [part.tolist() for part in nested] == [[1, 2], [3]]


def test_the_demo_file_is_what_the_library_reads(demo_path: Path) -> None:
    start = time.perf_counter()
    file = GGUFFile(demo_path)
    seconds = time.perf_counter() - start
    assert seconds < 0.6, f"header read in {seconds:.3f} s, meant: 0.15 s on an idle machine"
    reader = gguf.GGUFReader(demo_path)
    assert set(file.names) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        assert file.shape(tensor.name) == tuple(int(size) for size in tensor.shape[::-1])
        assert file.type_name(tensor.name) == tensor.tensor_type.name
        raw = file.raw(tensor.name)
        assert raw.nbytes == tensor.n_bytes
        assert np.array_equal(raw[:4096], tensor.data.reshape(-1).view(np.uint8)[:4096])
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for key, field in fields.items():
        found = file.metadata[key]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents(), key


def test_a_tensor_is_a_read_only_view_and_outlives_close(tmp_path: Path) -> None:
    made = write_library(tmp_path / "x.gguf")
    file = GGUFFile(tmp_path / "x.gguf")
    tensor = file.tensor("Q4_1")
    assert all(np.shares_memory(plane, file.raw("Q4_1")) for plane in tensor.planes.values())
    assert not any(plane.flags.writeable for plane in tensor.planes.values())
    file.close()
    assert np.array_equal(tensor.dequantise(), gguf.quants.dequantize(made["Q4_1"], Types.Q4_1))
    with pytest.raises(ValueError, match="closed"):
        file.tensor("Q4_1")


# ---------------------------------------------------------------- files written by hand


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array_of(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def info(name: str | bytes = "w", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(
    keys: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (),
    data: int = 0,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    align: int = 32,
) -> bytes:
    num_tensors, num_keys = counts or (len(infos), len(keys))
    head = magic + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join((*keys, *infos))
    return head + bytes(-len(head) % align) + bytes(data)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "x.gguf"
    path.write_bytes(content)
    return path


def test_version_2_and_the_least_file(tmp_path: Path) -> None:
    file = GGUFFile(write(tmp_path, file_of((key("a", U32, struct.pack("<I", 7)),), (info(),), 16, version=2)))
    assert file.metadata == {"a": 7} and file.tensor("w").dequantise().tolist() == [0] * 4
    empty = GGUFFile(write(tmp_path, file_of()))
    assert empty.names == () and empty.metadata == {} and empty.nbytes == 0


@pytest.mark.parametrize(
    "strings",
    [[], [""], ["", "", ""], ["a", "", "ĠbÄ 漢 😀"], ["a\0b", "\0", "c"], ["x" * 300, "\0" * 9, "é"]],
    ids=["none", "empty", "all empty", "mixed", "with zeros", "long"],
)
def test_strings_are_read_as_they_are(tmp_path: Path, strings: list[str]) -> None:
    values = b"".join(text(one) for one in strings)
    file = GGUFFile(write(tmp_path, file_of(keys=(key("s", ARRAY, array_of(STRING, len(strings), values)),))))
    found = file.metadata["s"]
    assert found == strings
    assert isinstance(found, Sequence) and len(found) == len(strings) and list(found) == strings
    assert [found[i] for i in range(len(strings))] == strings and found[1:] == strings[1:]


def test_order_is_the_files_and_gaps_are_allowed(tmp_path: Path) -> None:
    content = file_of((), (info("b", offset=96), info("a", offset=0)), 112)
    assert GGUFFile(write(tmp_path, content)).names == ("a", "b")


def test_unknown_types_are_listed_and_refused(tmp_path: Path) -> None:
    file = GGUFFile(write(tmp_path, file_of((), (info(), info("new", (3, 5), 99, 32)), 64)))
    assert file.shape("new") == (5, 3) and file.type_name("new") == "type 99"
    with pytest.raises(UnsupportedModel, match="'new' is type 99, supported: F32"):
        file.tensor("new")
    assert file.tensor("w").shape == (4,)


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    # A file of 1 TiB, all but a few bytes of it a hole: reading it whole would never end.
    content = file_of((), (info("hole", (2**30, 2**10), 24), info("end", (1,), offset=2**40)))
    path = write(tmp_path, content)
    with path.open("r+b") as out:
        out.seek(len(content) + 2**40)
        out.write(struct.pack("<f", 2.5))
    assert GGUFFile(path).tensor("end").dequantise().tolist() == [2.5]


def align_key(value: int, kind: int = U32, form: str = "<I") -> tuple[bytes]:
    return (key("general.alignment", kind, struct.pack(form, value)),)


def nested(depth: int) -> bytes:
    return key("deep", ARRAY, array_of(ARRAY, 1) * (depth - 1) + array_of(U32, 0))


BAD: Mapping[str, tuple[bytes, str]] = {
    "empty file": (b"", "empty"),
    "two bytes": (b"GG", "magic needs 4 bytes"),
    "wrong magic": (file_of(magic=b"GGML"), "magic: got b'GGML'"),
    "ends in the version": (b"GGUF\3", "version needs 4 bytes"),
    "ends in the counts": (file_of()[:20], "key count needs 8 bytes"),
    "tensor count past the file": (file_of(counts=(2**63, 0)), "tensor count is 9223372036854775808"),
    "tensor count over the bound": (file_of(counts=(2**19, 0), data=2**25), "tensor count is 524288"),
    "key count past the file": (file_of(counts=(0, 2**40)), "key count is 1099511627776"),
    "key longer than the file": (file_of((struct.pack("<Q", 2**62),), counts=(0, 1), data=64), "key 0 needs"),
    "key length of 2^64 - 1": (file_of((struct.pack("<Q", 2**64 - 1),), counts=(0, 1), data=64), "key 0 needs"),
    "key not UTF-8": (file_of((key(b"a\xff", U32, bytes(4)),)), "key 0 is not UTF-8"),
    "key twice": (file_of((key("k", BOOL, b"\1"), key("k", BOOL, b"\1"))), "key 'k' is there twice"),
    "value type": (file_of((key("k", 13, bytes(8)),)), "key 'k' has the value type 13"),
    "bool of 2": (file_of((key("k", BOOL, b"\2"),)), "key 'k' holds a bool of 2"),
    "bool array of 9": (file_of((key("k", ARRAY, array_of(BOOL, 2, b"\1\x09")),)), "key 'k' holds a bool of 9"),
    "value past the file": (
        file_of((key("key of a number", U64, b""),), align=1),
        "key 'key of a number' needs 8 bytes",
    ),
    "string past the file": (file_of((key("k", STRING, struct.pack("<Q", 999)),)), "key 'k' needs 999 bytes"),
    "string not UTF-8": (file_of((key("k", STRING, text(b"ab\xc3")),)), "key 'k' is not UTF-8"),
    "array of a wrong type": (file_of((key("k", ARRAY, array_of(77, 0)),)), "'k' is an array of the value type 77"),
    "array longer than the file": (file_of((key("k", ARRAY, array_of(U32, 2**61)),)), "'k': array length is 2305843"),
    "strings more than the file": (file_of((key("k", ARRAY, array_of(STRING, 2**61)),)), "'k': array length is 230"),
    "strings over the bound": (
        file_of((key("k", ARRAY, array_of(STRING, 2**22 + 1)),), data=2**26),
        "'k': array length is 4194305, allowed: up to 4194304",
    ),
    "string in an array past the file": (
        file_of((key("k", ARRAY, array_of(STRING, 2, text("a") + struct.pack("<Q", 2**63))),)),
        "'k': string 1 of 9223372036854775808 bytes",
    ),
    "array ends in a string's length": (
        file_of((key("key of strings", ARRAY, array_of(STRING, 2, text("eightbyt") + b"\1")),), align=1),
        "'key of strings': ends inside string 1",
    ),
    "string in an array not UTF-8": (
        file_of((key("k", ARRAY, array_of(STRING, 2, text("a") + text(b"\xff"))),)),
        "'k': string 1 is not UTF-8",
    ),
    "arrays too deep": (file_of((nested(MAX_DEPTH + 1),)), "'deep' nests arrays deeper than 4"),
    "arrays deep without end": (file_of((nested(100_000),)), "'deep' nests arrays deeper than 4"),
    "arrays in arrays over the bound": (
        file_of((key("k", ARRAY, array_of(ARRAY, 2**16 + 1)),), data=2**21),
        "'k': array length is 65537, allowed: up to 65536",
    ),
    "alignment 0": (file_of(align_key(0)), "general.alignment: got 0"),
    "alignment 24": (file_of(align_key(24)), "general.alignment: got 24"),
    "alignment negative": (file_of(align_key(-8, I32, "<i")), "general.alignment: got -8"),
    "alignment a float": (file_of(align_key(32, F32, "<f")), "general.alignment: got 32.0"),
    "alignment true": (file_of(align_key(1, BOOL, "<B")), "general.alignment: got True"),
    "alignment past the file": (file_of(align_key(2**31), (info(),), 64), "tensor 'w': bytes 2147483648"),
    "table cut": (file_of((), (info("long name of a tensor" * 3)[:-2],), align=1, counts=(1, 0)), "tensor 'long name"),
    "tensor name past the file": (file_of((), (struct.pack("<Q", 999) + bytes(99),)), "tensor name needs 999"),
    "tensor twice": (file_of((), (info(), info(offset=32)), 64), "tensor 'w' is there twice"),
    "no dimensions": (file_of((), (info(dims=()), info()), 64), "tensor 'w' has 0 dimensions, allowed: 1 to 4"),
    "five dimensions": (file_of((), (info(dims=(1,) * 5),), 64), "tensor 'w' has 5 dimensions"),
    "a dimension of 0": (file_of((), (info(dims=(4, 0)),), 64), r"tensor 'w' has a dimension of size 0: \(4, 0\)"),
    "product past 64 bits": (file_of((), (info(dims=(2**32,) * 4),), 64), "tensor 'w': shape .* overflows 64 bits"),
    "product wraps to 4": (file_of((), (info(dims=(2**62 + 1, 4)),), 64), "tensor 'w': shape .* overflows"),
    "bytes past 64 bits": (file_of((), (info(dims=(2**62,)),), 64), "tensor 'w': bytes 64 to .* not inside"),
    "row not whole blocks": (file_of((), (info(dims=(33,), kind=8),), 64), "tensor 'w': a row of 33 .* Q8_0's block"),
    "offset not aligned": (file_of((), (info(offset=4),), 64), "tensor 'w': offset 4 is not a multiple of 32"),
    "offset past the file": (file_of((), (info(offset=2**63),), 64), "tensor 'w': bytes 9223372036"),
    "offset past the file, unknown type": (file_of((), (info(kind=99, offset=2**20),), 64), "tensor 'w': bytes 1048"),
    "ends inside the tensor": (file_of((), (info(),), 15), "tensor 'w': bytes 64 to 80 .* file of 79 bytes"),
    "overlap": (file_of((), (info("v", (9,)), info(offset=32)), 99), "tensors 'v' and 'w' overlap"),
    "overlap of one byte": (
        file_of(align_key(1), (info("v", (5,), 24), info("w", offset=4)), 64, align=1),
        "tensors 'v' and 'w' overlap",
    ),
    "the same bytes twice": (file_of((), (info("v"), info()), 64), "tensors 'v' and 'w' overlap"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_a_checkpoint_error(tmp_path: Path, kind: str) -> None:
    content, words = BAD[kind]
    path = write(tmp_path, content)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=words) as caught:
        GGUFFile(path)
    assert time.perf_counter() - start < PATIENCE_S
    message = str(caught.value)
    assert "x.gguf" in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (file_of(version=1), "version 1, supported: 2 and 3"),
        (file_of(version=4), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    ],
)
def test_other_versions_are_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        GGUFFile(write(tmp_path, content))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match=path.name):
            GGUFFile(path)


def test_the_deepest_array_allowed(tmp_path: Path) -> None:
    found = GGUFFile(write(tmp_path, file_of((nested(MAX_DEPTH),)))).metadata["deep"]
    for _ in range(MAX_DEPTH - 1):
        assert isinstance(found, list) and len(found) == 1
        found = found[0]
    assert isinstance(found, np.ndarray) and found.size == 0


# ---------------------------------------------------------------- damage


def survive(path: Path, content: bytes) -> bool:
    """Reads all there is to read; True if nothing was refused. Anything but a coded error goes through."""
    path.write_bytes(content)
    start = time.perf_counter()
    try:
        file = GGUFFile(path)
        for name in file.names:
            file.tensor(name).dequantise()
    except (CheckpointError, UnsupportedModel) as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return False
    finally:
        assert time.perf_counter() - start < PATIENCE_S
    return True


def small(folder: Path) -> bytes:
    """The package's file with every type, less the tensor types that are refused."""
    path = folder / "whole.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("x.tokens", ["a", "bc", "ü"])
    writer.add_array("x.ints", [1, 2, 3])
    writer.add_uint32("x.number", 5)
    writer.add_bool("x.flag", True)
    rng = np.random.default_rng(1)
    writer.add_tensor("a.weight", rng.standard_normal((3, 4)).astype(np.float32))
    for kind in (Types.Q4_1, Types.Q8_0):
        raw = gguf.quants.quantize(rng.standard_normal((2, 64)).astype(np.float32), kind)
        writer.add_tensor(kind.name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Path, bytes]]:
    folder = tmp_path_factory.mktemp("damage")
    content = small(folder)
    return lambda: (folder / "mutant.gguf", content)


def test_every_truncation_and_every_byte_of_the_header(damaged: Callable[[], tuple[Path, bytes]]) -> None:
    path, whole = damaged()
    assert survive(path, whole)
    table_end = whole.index(b"Q8_0") + 4 + 4 + 16 + 12
    last = len(whole.rstrip(b"\0"))
    for length in range(0, last, 3):
        assert not survive(path, whole[:length])
    for at in range(table_end):
        for change in (0x01, 0x80, 0xFF):
            survive(path, whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])


@settings(max_examples=400)
@given(data=st.data())
def test_spliced_and_overwritten_files(damaged: Callable[[], tuple[Path, bytes]], data: st.DataObject) -> None:
    path, whole = damaged()
    at = data.draw(st.integers(0, len(whole)))
    number = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
    source = st.integers(0, len(whole) - 1)
    piece = data.draw(
        st.one_of(
            number.map(lambda value: struct.pack("<Q", value)),
            st.binary(max_size=16),
            st.tuples(source, st.integers(0, 64)).map(lambda cut: whole[cut[0] : sum(cut)]),
        )
    )
    replaced = data.draw(st.sampled_from([0, len(piece), 8]))
    survive(path, whole[:at] + piece + whole[at + replaced :])
