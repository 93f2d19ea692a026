"""Chat templates from a folder: sandboxed as in transformers, and with limited time and memory."""

import datetime
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepseek_v3 import DeepseekV3Tokenizer
from deepseek_v3.tokenization import CHAT_TEMPLATE, templates

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
FOREIGN = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ extra }}{% if add_generation_prompt %}<go>{% endif %}"
)


def with_template(folder: Path, template: str) -> DeepseekV3Tokenizer:
    (folder / "chat_template.jinja").write_text(template)
    return AutoTokenizer.from_pretrained(folder)


BOMBS = {
    "long text": "{{ 'a' * 10**10 }}",
    "doubling": "{% set n = namespace(x='aa') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "wide format": "{{ '%10000000000d' % 1 }}",
    "centred": "{{ 'a' | center(10**10) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 10 ** (10**9) }}",
    "long answer": "{% for e in 'é' %}{{ e * 4 * 10**7 }}{% endfor %}",  # the text fits, its JSON does not
}


SLOW = ("doubling", "power", "centred", "long answer")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in BOMBS])
def test_templates_that_need_too_much_are_stopped(name: str, folder, monkeypatch) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 1)
    templates._RENDERER.stop()
    tokenizer = with_template(folder, BOMBS[name])
    before = sum(os.times()[2:4])
    with pytest.raises(ValueError, match="chat_template: the folder's template needs more than 1 s or 256 MiB"):
        tokenizer.apply_chat_template(CHAT, tokenize=False)
    templates._RENDERER.stop()  # so that the system counts its time
    assert sum(os.times()[2:4]) - before < 1 + 1 + 5  # its limit, its resolution, its start


ESCAPES = {
    "internals": "{{ messages.__class__.__mro__ }}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "a file": "{% include 'config.json' %}",
    "an import": "{% import 'os' as os %}",
    "a function's globals": "{{ raise_exception.__globals__ }}",
    "a changed list": "{{ messages.append(1) }}",
    "an error": "{{ raise_exception('no') }}",
    "syntax": "{% if",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_the_sandbox_holds(name: str, folder) -> None:
    tokenizer = with_template(folder, ESCAPES[name])
    try:
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == ""  # an undefined name
    except ValueError as error:
        assert str(error).startswith("chat_template: the folder's template fails")


def test_a_folders_template_renders_as_in_stock(folder, tmp_path) -> None:
    ours = with_template(folder, FOREIGN)
    stock = PreTrainedTokenizerFast.from_pretrained(folder)
    assert isinstance(ours.chat_template, templates.FileTemplate) and ours.chat_template == stock.chat_template

    def weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: where
        """
        return city

    for arguments in (
        {"tokenize": False},
        {"tokenize": False, "add_generation_prompt": True, "extra": "é<&>"},
        {"tools": [weather, {"type": "function"}], "return_dict": True},
        {"return_assistant_tokens_mask": True, "return_dict": True},
        {"continue_final_message": True, "tokenize": False},
        {"sanitize_control_tokens": True},
    ):
        for chat in (CHAT, [CHAT, CHAT[:1]]):
            if arguments.get("continue_final_message") and chat is not CHAT:
                continue
            expected, found = (each.apply_chat_template(chat, **arguments) for each in (stock, ours))
            assert dict(found) == dict(expected) if hasattr(found, "keys") else found == expected, arguments

    ours.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == FOREIGN


def test_templates_of_this_package_and_of_the_caller_need_no_process(checkpoint, folder, monkeypatch) -> None:
    def fail(self, arguments):
        raise AssertionError("started a process")

    monkeypatch.setattr(templates._Renderer, "render", fail)
    own = AutoTokenizer.from_pretrained(checkpoint)
    assert own.chat_template == CHAT_TEMPLATE
    assert "hi" in own.apply_chat_template(CHAT, tokenize=False)
    foreign = with_template(folder, FOREIGN)
    assert foreign.apply_chat_template(CHAT, chat_template="{{ messages[0].content }}", tokenize=False) == "hi"
    given = AutoTokenizer.from_pretrained(folder, chat_template="{{ messages[0].content }}!")
    assert given.apply_chat_template(CHAT, tokenize=False) == "hi!"
    with pytest.raises(AssertionError, match="started a process"):
        foreign.apply_chat_template(CHAT, tokenize=False)


def test_named_templates_of_a_folder_are_limited_too(folder) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {"default": "d{{ messages | length }}", "rag": BOMBS["long text"]}
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "d2"
    with pytest.raises(ValueError, match="needs more than"):
        tokenizer.apply_chat_template(CHAT, chat_template="rag", tokenize=False)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "d2"  # with a new process


def test_a_fork_has_its_own_process(folder) -> None:
    tokenizer = with_template(folder, "{{ messages[0].content }}")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "hi"
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, tokenizer.apply_chat_template(CHAT, tokenize=False).encode())
        templates._RENDERER.stop()
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 10) == b"hi"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "hi"


def echo(tokenizer: DeepseekV3Tokenizer, content: object) -> str:
    return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)


def test_after_an_interruption_each_chat_gets_its_own_text(folder, monkeypatch) -> None:
    tokenizer = with_template(folder, "{{ messages[0].content }}")
    assert echo(tokenizer, "first") == "first"

    def interrupt() -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(templates._RENDERER._process.stdout, "readline", interrupt)
        echo(tokenizer, "second")
    assert echo(tokenizer, "third") == "third"


def test_a_process_that_was_ended_is_started_anew(folder) -> None:
    tokenizer = with_template(folder, "{{ messages[0].content }}")
    assert echo(tokenizer, "first") == "first"
    pid = templates._RENDERER._process.pid
    assert os.getsid(pid) != os.getsid(0)  # a terminal's Ctrl-C does not reach it
    os.kill(pid, signal.SIGTERM)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert echo(tokenizer, "second") == "second"


def test_a_process_that_cannot_start_is_no_template_that_needs_too_much(folder, monkeypatch) -> None:
    templates._RENDERER.stop()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ValueError, match="chat_template: the process for the folder's template ended with status 1"):
        echo(with_template(folder, "{{ messages[0].content }}"), "first")


def test_values_that_are_not_json_are_named(folder) -> None:
    tokenizer = with_template(folder, "{{ messages[0].content }}")
    with pytest.raises(ValueError, match="chat_template: .* JSON values only: Object of type date is not JSON"):
        echo(tokenizer, datetime.date(2025, 1, 1))
    assert echo(tokenizer, "next") == "next"
