"""What the kernels compute, on the host under sanitizers and through the mock driver, against PyTorch bit for bit."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from kvembed_cuda import QUANT, SEGMENT, Code, CudaError, CudaUnavailableError, Group, Kernels, Stream, Type

from kvembed._codecs.blocks import SPAN
from kvembed._codecs.quantise import FP8, INT8, quantise

from ._mock import HERE, MockDriver, compile_cpp

DTYPES = {Type.FLOAT32: torch.float32, Type.FLOAT16: torch.float16, Type.BFLOAT16: torch.bfloat16}
WAYS = [
    (Code.INT8, Group.TOKEN),
    (Code.INT8, Group.CHANNEL),
    (Code.FP8_E4M3, Group.TOKEN),
    (Code.FP8_E4M3, Group.CHANNEL),
    (Code.FP8_E4M3, Group.NONE),
]


# -- the reference ------------------------------------------------------------------------------------


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Codes of float32 numbers; PyTorch makes not-a-number of what is over 448."""
    held = torch.where(torch.isfinite(x), x.clamp(-448, 448), torch.copysign(torch.full_like(x, torch.nan), x))
    return held.to(torch.float8_e4m3fn).view(torch.uint8)


def reference(x: torch.Tensor, code: Code, group: Group, span: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of ``[heads, tokens, width]``."""
    x = x.float()
    if group is Group.CHANNEL and x.shape[1] > span:
        parts = [reference(part, code, group, span) for part in x.split(span, dim=1)]
        return torch.cat([codes for codes, _ in parts], 1), torch.cat([scales for _, scales in parts], 1)
    if group is Group.NONE:
        return to_fp8(x), torch.zeros(0)
    axis = 2 if group is Group.TOKEN else 1
    most = x.abs().amax(axis, keepdim=True)
    scale = most / torch.tensor(127.0 if code is Code.INT8 else 448.0)
    scale = torch.where(torch.isfinite(most), scale, torch.nan)
    scaled = x / torch.where(scale > 0, scale, torch.inf)
    scaled = torch.where(torch.isnan(scale), 0.0, scaled)
    if code is Code.INT8:
        codes = scaled.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    else:
        codes = to_fp8(scaled)
    return codes, scale


def same_floats(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, but that any not-a-number is as good as another."""
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


def numbers(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers of all sizes, with groups of zeros, ties, and values that are not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-3, 9, shape, generator=generator)
    x[0, 1] = 0  # a token of zeros
    x[:, :, 2] = -0.0  # channels of zeros
    x[0, 2] = torch.arange(shape[2]) - shape[2] // 2 + 0.5  # ties
    x[0, 2, 0] = 127  # with a scale of 1
    x[-1, 3] = 1e-42  # a token whose scale is none
    if seed % 2:
        x[-1, 0, 0], x[-1, 4, 1], x[-1, 5, 3] = torch.inf, -torch.inf, torch.nan
    return x.to(dtype)


# -- on the host, under sanitizers --------------------------------------------------------------------


@pytest.fixture(scope="module")
def functors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off"]
    return compile_cpp(HERE / "functors.cpp", tmp_path_factory.mktemp("functors") / "functors", *flags)


def run(program: Path, cases: list[bytes]) -> bytes:
    done = subprocess.run(
        [str(program)], input=struct.pack("<Q", len(cases)) + b"".join(cases), capture_output=True, check=False
    )
    assert not done.returncode, done.stderr.decode(errors="replace")
    return done.stdout


def packed(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def quant_case(x: torch.Tensor, kind: Type, code: Code, group: Group, span: int = 8) -> bytes:
    """A case of [heads, tokens, width] whose heads and tokens may lie apart."""
    size = x.element_size()
    nbytes = (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) * size
    raw = x.as_strided((nbytes // size,), (1,)).view(torch.uint8).numpy().tobytes()
    pitches = x.stride(0) * size, x.stride(1) * size
    return packed(2, kind, code, group, *x.shape, span, *pitches, len(raw)) + raw


@pytest.mark.parametrize("kind", Type, ids=lambda kind: kind.name)
def test_quantising_has_the_bits_of_pytorch(functors: Path, kind: Type) -> None:
    cases, wanted = [], []
    for seed, shape in enumerate([(3, 20, 64), (1, 7, 37), (2, 6, 128), (4, 300, 5)]):
        for code, group in WAYS:
            x = numbers(DTYPES[kind], shape, seed)
            cases.append(quant_case(x, kind, code, group))
            wanted.append((code, group, *reference(x, code, group)))
            wide = torch.zeros(shape[0] + 1, shape[1] + 2, shape[2] + 3, dtype=x.dtype)
            inner = wide[1:, 1:-1, 1:-2]  # a view: heads and tokens lie apart
            inner.copy_(x)
            cases.append(quant_case(inner, kind, code, group))
            wanted.append(wanted[-1])
    at, out = 0, run(functors, cases)
    for code, group, codes, scales in wanted:
        got = np.frombuffer(out, np.uint8, codes.numel(), at)
        at += got.nbytes
        got_scales = np.frombuffer(out, np.float32, scales.numel(), at)
        at += got_scales.nbytes
        assert same_floats(got_scales, scales.numpy().ravel()), (code, group)
        assert (got == codes.numpy().ravel()).all(), (code, group)
    assert at == len(out)


@pytest.mark.parametrize("kind", Type, ids=lambda kind: kind.name)
def test_quantising_has_the_bits_of_kvembeds_codecs(functors: Path, kind: Type) -> None:
    """What a GPU made and what a processor made of the same block has to be one file."""
    cases, wanted = [], []
    for seed, shape in enumerate([(2, 256, 64), (1, 129, 16), (3, 40, 128)]):
        x = numbers(DTYPES[kind], shape, 2 * seed)  # all finite: else the codecs store it as it is
        for code, dtype in ((Code.INT8, INT8), (Code.FP8_E4M3, FP8)):
            cases += [quant_case(x, kind, code, group, SPAN) for group in (Group.TOKEN, Group.CHANNEL)]
            parts = *quantise(x, dtype, "token", 1), *quantise(x, dtype, "channel", SPAN)
            wanted += [part.contiguous().view(torch.uint8) for part in parts]
    assert run(functors, cases) == b"".join(part.numpy().tobytes() for part in wanted)


@pytest.mark.parametrize("kind", [Type.FLOAT16, Type.BFLOAT16], ids=lambda kind: kind.name)
def test_every_16_bit_number_becomes_the_fp8_of_pytorch(functors: Path, kind: Type) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(DTYPES[kind]).reshape(1, 64, 1024)
    out = np.frombuffer(run(functors, [quant_case(every, kind, Code.FP8_E4M3, Group.NONE)]), np.uint8)
    want = to_fp8(every.float()).numpy().ravel()
    # The sign of what is not a number means nothing, and some processors lose it.
    assert ((out == want) | ((out & 127 == 127) & (want & 127 == 127))).all()


def test_float32_at_every_rounding_edge_of_fp8(functors: Path) -> None:
    """All 127 magnitudes, the halves between them, and the floats next to both."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    edges = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([460.0, 464.0, 480.0, 1e9])])
    near = torch.cat(
        [edges, torch.nextafter(edges, torch.tensor(torch.inf)), torch.nextafter(edges, torch.tensor(0.0))]
    )
    x = torch.cat([near, -near]).reshape(1, 1, -1)
    out = np.frombuffer(run(functors, [quant_case(x, Type.FLOAT32, Code.FP8_E4M3, Group.NONE)]), np.uint8)
    assert (out == to_fp8(x).numpy().ravel()).all()


def test_rows_gathered_and_scattered_at_any_alignment(functors: Path) -> None:
    random = np.random.default_rng(0)
    cases, wanted = [], []
    for number in range(400):
        row = int(random.integers(1, 70))
        pitch = row + int(random.integers(0, 40))
        if number % 3:  # mostly multiples of something
            unit = int(random.choice([2, 4, 8, 16]))
            row, pitch = -(-row // unit) * unit, -(-pitch // unit) * unit
            pitch = max(pitch, row)
            shifts = [int(random.integers(0, 3)) * unit for _ in range(2)]
        else:
            shifts = [int(random.integers(0, 17)) for _ in range(2)]
        rows, places = int(random.integers(1, 9)), 12
        index = random.permutation(places)[:rows] if number % 2 else np.arange(rows)
        strided = random.integers(0, 256, (places - 1) * pitch + row, dtype=np.uint8)
        flat = random.integers(0, 256, rows * row, dtype=np.uint8)
        starts = [int(place) * pitch for place in index]
        gathered = np.concatenate([strided[start : start + row] for start in starts])
        scattered = strided.copy()
        for r, start in enumerate(starts):
            scattered[start : start + row] = flat[r * row : (r + 1) * row]
        table = index.astype("<i8").tobytes() if number % 2 else b""
        threads = int(random.choice([1, 3, 64]))
        case = packed(pitch, row, rows, len(strided), *shifts, threads, len(table) // 8)
        case += table + strided.tobytes() + flat.tobytes()
        cases += [packed(0) + case, packed(1) + case]
        wanted += [gathered.tobytes(), scattered.tobytes()]
    assert run(functors, cases) == b"".join(wanted)


def test_the_sanitizers_are_awake(functors: Path) -> None:
    """A row beyond the buffer: were it not seen, the tests above would prove little."""
    case = packed(0, 16, 16, 2, 16, 0, 0, 1, 0) + bytes(16) + bytes(32)  # two rows, memory for one
    done = subprocess.run([str(functors)], input=packed(1) + case, capture_output=True, check=False)
    assert done.returncode
    assert b"heap-buffer-overflow" in done.stderr


# -- through the driver -------------------------------------------------------------------------------


@pytest.fixture
def kernels(driver: MockDriver, tmp_path: Path) -> Kernels:
    (tmp_path / "kernels").write_bytes(b"MOCK")
    return Kernels(driver, 0, tmp_path / "kernels")


def address(array: np.ndarray | torch.Tensor) -> int:
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.__array_interface__["data"][0]


def test_a_block_quantised_on_its_way_out(driver: MockDriver, kernels: Kernels) -> None:
    """More tensors than one launch takes; keys by channel, values by token; the table may go before it has run."""
    stream = Stream(driver, 0)
    cache = torch.stack([numbers(torch.bfloat16, (2, 12, 32), seed) for seed in range(140)])
    part = cache[:, :, 3:11]
    codes = np.zeros((140, 2, 8, 32), np.uint8)
    scales = [np.zeros((2, 3, 32) if i % 2 else (2, 8, 1), np.float32) for i in range(140)]
    table = np.zeros(140, QUANT)
    for i in range(140):
        group = Group.CHANNEL if i % 2 else Group.TOKEN
        ends = address(part[i]), address(codes[i]), address(scales[i])
        table[i] = (*ends, part.stride(1) * 2, part.stride(2) * 2, 2, 8, 32, 3, Type.BFLOAT16, Code.INT8, group, 0)
    kernels.quantise(table, stream.handle)
    table[...] = 0
    stream.synchronize()
    for i in range(140):
        want, want_scales = reference(part[i], Code.INT8, Group.CHANNEL if i % 2 else Group.TOKEN, span=3)
        assert (codes[i] == want.numpy()).all()
        assert same_floats(scales[i], want_scales.numpy())
    assert driver.calls("cuLaunchKernel") == 4


def test_pages_gathered_and_scattered(driver: MockDriver, kernels: Kernels) -> None:
    stream, random = Stream(driver, 0), np.random.default_rng(1)
    pages = random.integers(0, 256, (70, 40, 24), dtype=np.uint8)
    index = np.stack([random.permutation(40)[:16] for _ in range(70)]).astype(np.int64)
    flat = np.zeros((70, 16, 24), np.uint8)
    table = np.zeros(70, SEGMENT)
    for i in range(70):
        table[i] = (address(pages[i]), address(flat[i]), 24, 24, 16, address(index[i]))
    kernels.gather(table, stream.handle)
    stream.synchronize()
    want = np.take_along_axis(pages, index[:, :, None], 1)
    assert (flat == want).all()
    again = pages.copy()
    np.put_along_axis(pages, index[:, :, None], 0, 1)
    kernels.scatter(table, stream.handle)
    stream.synchronize()
    assert (pages == again).all()
    assert driver.calls("cuLaunchKernel") == 4


def test_what_kernels_refuse(driver: MockDriver, kernels: Kernels) -> None:
    good = np.zeros(2, QUANT)
    good[:] = (4096, 4096, 4096, 64, 32, 1, 2, 16, 0, Type.BFLOAT16, Code.INT8, Group.TOKEN, 0)
    for name, value, text in (
        ("type", 3, "type"),
        ("code", 2, "code"),
        ("group", 3, "group"),
        ("group", Group.NONE, "int8 needs scales"),
        ("scales", 4098, "scales"),
        ("scales", 0, "scales"),
        ("group", Group.CHANNEL, "span"),
        ("src", 4097, "pitch"),
        ("token_pitch", 33, "pitch"),
        ("out", 0, "address"),
        ("width", 0, "shape"),
    ):
        bad = good.copy()
        bad[1][name] = value
        with pytest.raises(ValueError, match=f"tensor 1 has a wrong .*{text}"):
            kernels.quantise(bad, 2)
    segments = np.zeros(1, SEGMENT)
    segments[0] = (4096, 4096, 8, 8, 1, 0)
    for name, text in (
        ("rows", "no rows"),
        ("row_bytes", "no bytes"),
        ("strided", "no address"),
        ("packed", "no address"),
    ):
        bad = segments.copy()
        bad[0][name] = 0
        with pytest.raises(ValueError, match=text):
            kernels.gather(bad, 2)
    with pytest.raises(TypeError):
        kernels.gather(good, 2)
    with pytest.raises(CudaError, match="KVC_LEGACY_STREAM"):
        kernels.gather(segments, 0)
    kernels.gather(segments[:0], 2)
    assert driver.calls("cuLaunchKernel") == 0


def test_built_without_kernels(driver: MockDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvembed_cuda._library._FOLDER", tmp_path)
    with pytest.raises(CudaUnavailableError, match="built without kernels: build it where nvcc is installed"):
        Kernels(driver, 0)
