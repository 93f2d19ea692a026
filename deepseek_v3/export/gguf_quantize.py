"""GGUF's tensor types: which one each tensor gets, and the bytes of a tensor in it.

Q8_0, Q4_0 and Q5_0 are packed by the gguf library; the K-quants by llama.cpp's own C code, which several packages and
every build of llama.cpp bring: `ggml_quantize_chunk` is what `llama-quantize` itself calls.
"""

import ctypes
import ctypes.util
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize

from .gguf_tensors import EMBEDDING, HEAD, K_B, V_B
from .steps import cast

Type = GGMLQuantizationType
PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
CHUNK = 2**22  # elements quantized at a time: the libraries' temporaries are several times as large


class Quantization(NamedTuple):
    """`weights`: most of them; `sensitive`: the head, and with `more_bits` the down projections of some layers;
    `latent`: the two halves of kv_b_proj, which all heads' keys and values pass through."""

    file_type: LlamaFileType
    weights: Type
    sensitive: Type
    latent: Type
    more_bits: bool = False


QUANTIZATIONS = {
    "BF16": Quantization(LlamaFileType.MOSTLY_BF16, Type.BF16, Type.BF16, Type.BF16),
    "F32": Quantization(LlamaFileType.ALL_F32, Type.F32, Type.F32, Type.F32),
    "F16": Quantization(LlamaFileType.MOSTLY_F16, Type.F16, Type.F16, Type.F16),
    "Q8_0": Quantization(LlamaFileType.MOSTLY_Q8_0, Type.Q8_0, Type.Q8_0, Type.Q8_0),
    "Q4_0": Quantization(LlamaFileType.MOSTLY_Q4_0, Type.Q4_0, Type.Q8_0, Type.Q8_0),
    "Q5_0": Quantization(LlamaFileType.MOSTLY_Q5_0, Type.Q5_0, Type.Q8_0, Type.Q8_0),
    "Q6_K": Quantization(LlamaFileType.MOSTLY_Q6_K, Type.Q6_K, Type.Q6_K, Type.Q8_0),
    "Q4_K_M": Quantization(LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K, Type.Q6_K, Type.Q8_0, more_bits=True),
}
# For rows that are no multiple of a type's block, as in llama.cpp; F16 for what is no multiple of 32 either.
FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
K_QUANTS = tuple(FALLBACK)


def tensor_type(name: str, shape: tuple[int, ...], quantization: str, blocks: int, tied: bool) -> Type:
    """The type of a GGUF tensor. Norms, the router and its bias are F32, as llama.cpp needs them.

    Args:
        name, shape: of the tensor, slowest dimension first.
        quantization: a key of `QUANTIZATIONS`.
        blocks: layers of the file, MTP included.
        tied: whether the embedding is the head too.
    """
    if len(shape) < 2 or name.endswith("ffn_gate_inp.weight"):
        return Type.F32
    choice = QUANTIZATIONS[quantization]
    wanted = choice.weights
    if name.endswith((K_B, V_B)):
        wanted = choice.latent
    elif name == HEAD or (name == EMBEDDING and tied):
        wanted = choice.sensitive
    elif choice.more_bits and ".ffn_down" in name:
        # llama.cpp's `use_more_bits`: the first and last eighth of the layers, and every third between
        layer, eighth = int(name.split(".")[1]), blocks // 8
        if layer < eighth or layer >= 7 * blocks // 8 or (layer - eighth) % 3 == 2:
            wanted = choice.sensitive
    if shape[-1] % GGML_QUANT_SIZES[wanted][0]:
        wanted = FALLBACK.get(wanted, Type.F16)
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else Type.F16


def type_bytes(shape: tuple[int, ...], kind: Type) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def to_bytes(tensor: torch.Tensor, kind: Type, name: str) -> torch.Tensor:
    """A floating-point tensor in GGUF type `kind`: uint8, one-dimensional.

    Raises:
        ValueError: a number that is not finite, or too large for F16; names the tensor.
    """
    if not tensor.isfinite().all():
        raise ValueError(f"{name}: found numbers that are not finite, allowed in {kind.name} are finite ones")
    if kind in PLAIN:
        return cast(tensor, PLAIN[kind], name).contiguous().view(-1).view(torch.uint8)
    rows = tensor.reshape(-1, tensor.shape[-1])
    packed = torch.empty(len(rows), type_bytes(rows.shape[1:], kind), dtype=torch.uint8)
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step].float().contiguous().numpy()
        pack = _pack_k_quant if kind in K_QUANTS else quantize
        packed[start : start + step] = torch.from_numpy(pack(part, kind))
    return packed.view(-1)


def _pack_k_quant(rows: np.ndarray, kind: Type) -> np.ndarray:
    """`[R, K]` fp32 -> `[R, bytes]` uint8 through `ggml_quantize_chunk`."""
    packed = np.empty((len(rows), type_bytes(rows.shape[1:], kind)), dtype=np.uint8)
    call = ggml_library().ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    written = call(int(kind), rows.ctypes.data, packed.ctypes.data, 0, len(rows), rows.shape[1], None)
    assert written == packed.nbytes, (written, packed.nbytes)
    return packed


@functools.cache
def ggml_library() -> ctypes.CDLL:
    """llama.cpp's tensor library: inside xllamacpp or llama-cpp-python (which are not imported), or the system's own.

    Raises:
        ValueError: none is installed; says what to install.
    """
    candidates = []
    for package, pattern in (("xllamacpp", "xllamacpp*.so"), ("llama_cpp", "lib/libggml-base.*")):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            candidates += [str(file) for file in sorted(Path(folder).glob(pattern))]
    if found := ctypes.util.find_library("ggml-base"):
        candidates.append(found)
    for file in candidates:
        library = ctypes.CDLL(file)
        if hasattr(library, "ggml_quantize_chunk"):
            return library
    raise ValueError(
        "quantization: Q6_K and Q4_K_M need llama.cpp's quantizer, which is not installed: pip install xllamacpp "
        "(or llama-cpp-python, or llama.cpp itself with its libraries where the system finds them)"
    )
