"""Renders chat templates in a process of its own: `python template_process.py SECONDS BYTES`, started by `templates`.

Reads one JSON line of arguments per chat from standard input and writes one JSON line for each. The sandbox of
transformers keeps a template from Python's internals; the system keeps it from time and memory.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template


def limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main(seconds: int, extra_bytes: int) -> None:
    size = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
    limit(resource.RLIMIT_AS, size + extra_bytes)
    limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        limit(resource.RLIMIT_CPU, int(used) + 1 + seconds)  # past it, the system ends the process
        try:
            answer = {"result": render_jinja_template(**json.loads(line))}
        except MemoryError:
            raise
        except Exception as error:  # whatever a template raises is reported, and raised there
            answer = {"error": type(error).__name__, "message": str(error)[:10_000]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)  # as the system ends it past its time
