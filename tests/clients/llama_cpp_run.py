"""llama.cpp's server through xllamacpp, run in the client's environment: `FILE`, and a JSON request on standard input.

The request lists calls, `[path, body]`; the answer, on the last line of the output, their results in order. Everything
is computed in F32 as far as the file allows: F32 cache, no flash attention, no repacked weights, one thread.
"""

import json
import sys
import urllib.request

from xllamacpp import CommonParams, Server, common_speculative_type, ggml_type, llama_flash_attn_type

file, request = sys.argv[1], json.load(sys.stdin)
params = CommonParams()
params.model.path = file
params.n_ctx = params.n_batch = params.n_ubatch = 512
params.n_parallel = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.n_gpu_layers, params.warmup, params.fit_params, params.no_extra_bufts = 0, False, False, True
params.use_jinja, params.cache_prompt = True, False
if request["mtp"]:
    params.speculative.types = [common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
    params.load_mtp = True
    params.speculative.draft.n_max = 1

server = Server(params)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
results = []
for path, body in request["calls"]:
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(f"{server.listening_address}{path}", data)
    call.add_header("Content-Type", "application/json")
    results.append(json.load(opener.open(call)))
print(json.dumps(results))
