"""The chat template: equal to DeepSeek's on plain chats, and what ours adds."""

import json

import pytest

from deepseek_v3.tokenization import CHAT_TEMPLATE, DeepseekV3Tokenizer

USER, ASSISTANT, EOS, BOS = "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "杭州"}'}}
CALL_TEXT = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "杭州"}\n```<｜tool▁call▁end｜>'


def say(*turns):
    """("s", "text") ... to messages."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[role], "content": content} for role, content in turns]


CHATS = {
    "user": say(("u", "hi")),
    "system": say(("s", "Be brief."), ("u", "hi")),
    "two systems": say(("s", "Be brief."), ("u", "hi"), ("s", "Be kind.")),
    "empty system": say(("s", ""), ("u", "hi")),
    "turns": say(("s", "S"), ("u", "a\n\n b "), ("a", " c\n"), ("u", "d"), ("a", "e")),
    "reasoning dropped": say(
        ("u", "1+1"), ("a", "<think>\nhm\n</think>\n\n2"), ("u", "2+2"), ("a", "x</think>y</think>4")
    ),
    "two users": say(("u", "a"), ("u", "b")),
    "assistant first": say(("a", "hello"), ("u", "hi")),
    "markup in text": say(("u", "{{ x }} {% if %} <b> & 'q' \"q\""), ("a", "<think>")),
    "one call": [
        *say(("u", "weather?")),
        {"role": "assistant", "content": "Looking.", "tool_calls": [CALL]},
        *say(("t", "sunny")),
    ],
    "two calls, answered": [
        *say(("u", "weather?")),
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        *say(("t", "sunny"), ("t", "rain"), ("a", "Mixed."), ("u", "thanks")),
    ],
}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_equal_to_deepseeks_template(official, official_folder, name, prompt):
    theirs = json.loads((official_folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    assert official.chat_template == theirs != CHAT_TEMPLATE, "a folder's own template is kept"
    ours, reference = (
        official.apply_chat_template(CHATS[name], chat_template=each, tokenize=False, add_generation_prompt=prompt)
        for each in (CHAT_TEMPLATE, theirs)
    )
    assert ours == reference


def test_given_to_folders_without_one(official_folder, trained, tmp_path):
    config = json.loads((official_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "tokenizer.json").symlink_to(official_folder / "tokenizer.json")
    assert DeepseekV3Tokenizer.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE == trained.chat_template


def test_bos_is_not_doubled(trained):
    assert trained.add_bos_token
    ids = trained.apply_chat_template(CHATS["user"], return_dict=True).input_ids
    assert ids.count(0) == 1 and ids[0] == 0


@pytest.mark.parametrize("switch", ["thinking", "enable_thinking"])
def test_thinking_switch_is_v3_1(trained, switch):
    chat = say(("u", "1"), ("a", "<think>one</think>1"), ("u", "2"))

    def render(messages, value, prompt=True):
        return trained.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, **{switch: value}
        ).removeprefix(BOS)

    history = f"{USER}1{ASSISTANT}</think>1{EOS}{USER}2"
    assert render(chat, True) == f"{history}{ASSISTANT}<think>"
    assert render(chat, False) == f"{history}{ASSISTANT}</think>"
    # what the model then writes must continue the prompt it was given, reasoning only where it was asked for
    for answer in (
        {"content": "<think>two</think>2"},
        {"content": "two</think>2"},
        {"content": "2", "reasoning_content": "two"},
    ):
        full = [*chat, {"role": "assistant", **answer}]
        assert render(full, True, False) == render(chat, True) + f"two</think>2{EOS}"
        assert render(full, False, False) == render(chat, False) + f"2{EOS}"


@pytest.mark.parametrize("options", [{}, {"thinking": True}, {"thinking": False}])
def test_mask_is_what_the_assistant_writes(trained, options):
    chat = say(("s", "S"), ("u", "dog"), ("a", "the dog 今天"), ("u", "2"), ("a", "<think>hm</think>lazy"))
    out = trained.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False, **options
    )
    written = [token for token, mine in zip(out.input_ids, out.assistant_masks, strict=True) if mine]
    reasoning = "hm</think>" if options.get("thinking") else ""
    assert trained.decode(written) == f"the dog 今天{EOS}{reasoning}lazy{EOS}"


def test_mask_covers_tool_calls(trained):
    out = trained.apply_chat_template(
        CHATS["two calls, answered"], return_dict=True, return_assistant_tokens_mask=True
    )
    written = [token for token, mine in zip(out.input_ids, out.assistant_masks, strict=True) if mine]
    calls = f"<｜tool▁calls▁begin｜>{CALL_TEXT}\n{CALL_TEXT}<｜tool▁calls▁end｜>{EOS}"
    assert trained.decode(written) == f"{calls}Mixed.{EOS}"


def test_second_round_of_calls_is_whole(trained):
    """DeepSeek's template loses the marks of every round after the first; ours writes them."""
    round_ = [{"role": "assistant", "content": None, "tool_calls": [CALL]}, *say(("t", "sunny"))]
    text = trained.apply_chat_template(
        [*say(("u", "?")), *round_, *round_], tokenize=False, add_generation_prompt=True
    )
    calls = f"<｜tool▁calls▁begin｜>{CALL_TEXT}<｜tool▁calls▁end｜>{EOS}"
    outputs = "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    assert text == f"{BOS}{USER}?{ASSISTANT}{calls}{outputs}{calls}{outputs}"


def test_arguments_may_be_an_object(trained):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "杭州"}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert CALL_TEXT in trained.apply_chat_template([message], tokenize=False)


def test_tools_follow_the_system_text(trained):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "weather", "description": "Weather of a city 城", "parameters": parameters}
    tools = [{"type": "function", "function": function}, {"type": "function", "function": {"name": "now"}}]
    for system, lead in (("Be brief.", "Be brief.\n\n"), (None, "")):
        chat = say(*([("s", system)] if system else []), ("u", "hi"))
        text = trained.apply_chat_template(chat, tools=tools, tokenize=False)
        assert text.startswith(
            f"{BOS}{lead}## Tools\nYou have access to the following tools:\n\n### weather\n"
            f"Description: Weather of a city 城\n\nParameters: {json.dumps(parameters)}\n\n### now\n"
        )
        assert text.endswith(f"follows its parameters.{USER}hi")


def test_unknown_role_is_an_error(trained):
    with pytest.raises(Exception, match="unknown role developer"):
        trained.apply_chat_template([{"role": "developer", "content": "x"}], tokenize=False)
