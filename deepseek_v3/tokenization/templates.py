"""Chat templates that came in a file: rendered with limited time and memory.

transformers renders in a sandbox, which keeps a template from files and from Python's internals, but
`{{ 'a' * 10**10 }}` or a few nested loops still take the machine's memory or never end. A template from a folder is
therefore rendered in a process with limits. Those known here, and any that the caller gives, are rendered as usual.
"""

import atexit
import hashlib
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema, render_jinja_template

from .chat_template import CHAT_TEMPLATE

RENDER_SECONDS = 2  # of processor time, for one chat
RENDER_BYTES = 2**28  # more than the process has when it starts
_AT_A_LIMIT = (-9, -11, -24)  # status of a process that SIGKILL, SIGSEGV or SIGXCPU (absent on Windows) has ended
# sha256 of published templates that were read: DeepSeek-V3 (of March 2025)
_KNOWN = {"3a3036eeb96ca0e48565fc1f19b4d7d3fa17ada32bb1b3d5ed539ae74cf22923"}


class FileTemplate(str):
    """A chat template that a file brought, as opposed to one that the caller gave."""


def from_file(template: Any) -> Any:
    """Mark what a folder gave for `chat_template`, one text or one per name, unless it is known."""
    if isinstance(template, dict):
        return {name: from_file(each) for name, each in template.items()}
    if not isinstance(template, str) or template == CHAT_TEMPLATE:
        return template
    return template if hashlib.sha256(template.encode()).hexdigest() in _KNOWN else FileTemplate(template)


class _Renderer:
    """The process, started at the first chat and again after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def _running(self) -> subprocess.Popen:
        own = self._owner == os.getpid()  # a fork must not share the pipes
        if self._process is None or not own or self._process.poll() is not None:
            self.stop()
            script = Path(__file__).with_name("template_process.py")
            self._process = subprocess.Popen(
                [sys.executable, "-P", script, str(RENDER_SECONDS), str(RENDER_BYTES)],  # -P: no modules from here
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,  # an interruption is for the caller
            )
            self._owner = os.getpid()
        return self._process

    def render(self, arguments: dict[str, Any]) -> tuple[list[str], list]:
        try:
            request = json.dumps(arguments) + "\n"
        except TypeError as error:
            raise ValueError(f"chat_template: the folder's template takes JSON values only: {error}") from error
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(request)
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:  # an answer that was not read would be taken for the next chat's
                self.stop()
                raise
            if not line.endswith("\n"):
                status = process.wait()
                self.stop()
                if status in _AT_A_LIMIT:
                    limits = f"{RENDER_SECONDS} s or {RENDER_BYTES // 2**20} MiB"
                    raise ValueError(f"chat_template: the folder's template needs more than {limits} for a chat")
                raise ValueError(f"chat_template: the process for the folder's template ended with status {status}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(f"chat_template: the folder's template fails: {answer['error']}: {answer['message']}")
        return answer["result"]

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


_RENDERER = _Renderer()
atexit.register(_RENDERER.stop)


def render(*, conversations: Any, chat_template: str, tools: Any = None, **arguments: Any) -> tuple[list[str], list]:
    """As transformers' `render_jinja_template`; a `FileTemplate` in its own process.

    Raises:
        ValueError: a `FileTemplate` fails, or needs more time or memory than a chat may, or is given what JSON lacks.
    """
    if not isinstance(chat_template, FileTemplate):
        return render_jinja_template(
            conversations=conversations, chat_template=chat_template, tools=tools, **arguments
        )
    if tools is not None:
        arguments["tools"] = [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]
    rendered: list[str] = []
    indices: list = []
    for conversation in conversations:
        chat = {"conversations": [getattr(conversation, "messages", conversation)], "chat_template": chat_template}
        texts, ranges = _RENDERER.render({**arguments, **chat})
        rendered += texts
        indices += ranges
    return rendered, indices


def with_limits(method: Callable) -> Callable:
    """transformers' `apply_chat_template` with `render` in place of the function that it calls for rendering."""
    assert "render_jinja_template" in method.__code__.co_names
    names = {**method.__globals__, "render_jinja_template": render}
    limited = types.FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)
    limited.__kwdefaults__, limited.__doc__ = method.__kwdefaults__, method.__doc__
    return limited
