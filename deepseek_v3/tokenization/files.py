"""Checks on tokenizer files that come from elsewhere, each failing with the file's name."""

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .vocabulary import SPLIT_PATTERNS

# Eight times V3's vocabulary. An id far above is damage or an attack: the embedding table would have to be that long.
MAX_TOKEN_ID = 2**20 - 1

MAX_FILE_BYTES = 2**26  # V3's tokenizer.json has 7.8 MB
MAX_ITEMS = 2**21  # values in a file; V3's has 0.6 million, and parsing as many as allowed takes about a second
MAX_DEPTH = 32
MAX_ADDED_TOKENS = 2**14  # V3 has 818; the library's time for them grows faster than their number
MAX_EXTRA_TOKENS = 1024  # names of special tokens in tokenizer_config.json; quadratic in transformers
MAX_LENGTH = 2**20  # of a padded text, in tokens
MAX_TEMPLATE_CHARACTERS = 2**17
MAX_PART_LIST, MAX_PART_TEXT = 64, 4096  # lists and strings of normalizer, pre-tokenizer, post-processor and decoder

# The `tokenizers` library runs these by backtracking; a pattern such as (a+)+$ stalls it and then panics with a
# BaseException while a text is encoded. So only patterns that many models use are let through: DeepSeek's own, the
# cl100k one of GPT-4, Llama 3 (digits in threes) and Qwen (single digits), which V3-shaped models of others use, and
# the one of Moonlight and Kimi, which stands in their code (`tokenization_moonshot.py`, `pat_str`).
_CL100K = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
THREE_DIGITS, ONE_DIGIT = _CL100K % "{1,3}", _CL100K % ""
_UPPER, _LOWER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]"
MOONSHOT_PATTERN = (
    "[\\p{Han}]+"
    f"|[^\\r\\n\\p{{L}}\\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    f"|[^\\r\\n\\p{{L}}\\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
KNOWN_PATTERNS = frozenset((*SPLIT_PATTERNS, THREE_DIGITS, ONE_DIGIT, MOONSHOT_PATTERN))
# A normalizer that writes more than it reads multiplies a text, and an empty pattern never ends. These do neither.
NORMALIZERS = ("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Strip", "Lowercase", "Prepend", "Replace")
REPLACEMENTS = ((" ", "▁"), ("▁", " "))

# Arguments of the constructor that a file must not give: parts of the tokenizer that tokenizer.json holds.
_NOT_IN_A_FILE = ("tokenizer_object", "tokenizer_padding", "tokenizer_truncation", "post_processor", "gguf_file")


def read_json(file: str | PathLike) -> dict[str, Any]:
    """The JSON object in `file`; `ValueError` naming the file for anything else."""
    with open(file, "rb") as reader:
        raw = reader.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise ValueError(f"{file}: found over {MAX_FILE_BYTES} bytes, allowed {MAX_FILE_BYTES}")
    if (items := sum(map(raw.count, (b",", b"[", b"{")))) > MAX_ITEMS:
        raise ValueError(f"{file}: found {items} commas and brackets, allowed {MAX_ITEMS}")
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, a JSON object is expected")
    return content


def check_tokenizer_file(file: str | PathLike) -> None:
    """Refuse a `tokenizer.json` that is not a byte-level BPE with sane ids and known split patterns.

    Raises:
        ValueError: names `file`, the field, what was found and what is allowed.
    """
    content = read_json(file)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        found = model.get("type") if isinstance(model, dict) else type(model).__name__
        raise ValueError(f"{file}: model is {found!r}, only 'BPE' is allowed")
    vocab, added = model.get("vocab"), content.get("added_tokens", [])
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError(f"{file}: model.vocab must be a non-empty object of token -> id")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError(f"{file}: added_tokens must be a list of objects")
    if len(added) > MAX_ADDED_TOKENS:
        raise ValueError(f"{file}: added_tokens has {len(added)} entries, allowed are {MAX_ADDED_TOKENS}")
    tokens = (*vocab.items(), *((token.get("content"), token.get("id")) for token in added))
    for token, token_id in tokens:
        if not _is_id(token_id):
            raise ValueError(f"{file}: token {token!r:.100} has id {token_id!r:.100}, allowed are 0 to {MAX_TOKEN_ID}")
    for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(model.get(key))) > MAX_PART_TEXT:
            raise ValueError(f"{file}: model.{key} has over {MAX_PART_TEXT} characters")
    ids = {token_id for _, token_id in tokens}
    _check_length(f"{file}: padding", content.get("padding"), ids)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        _check_part(f"{file}: {part}", content.get(part), ids)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKEN_ID  # bool is an int to Python, hence the exact type


def _check_length(where: str, padding: Any, ids: set[int]) -> None:
    """The library pads every text at once, and ends the process where that takes too much memory."""
    if not isinstance(padding, dict):
        return  # the library refuses anything else but null
    strategy = padding.get("strategy")
    lengths = {"strategy": strategy.get("Fixed") if isinstance(strategy, dict) else None}
    lengths["pad_to_multiple_of"] = padding.get("pad_to_multiple_of")
    for key, length in lengths.items():
        if length is not None and not (type(length) is int and 0 <= length <= MAX_LENGTH):
            raise ValueError(f"{where}.{key} is {length!r:.100}, allowed are lengths up to {MAX_LENGTH}")
    if padding.get("pad_id") not in ids:
        raise ValueError(f"{where}.pad_id is {padding.get('pad_id')!r:.100}, which is the id of no token")


def _check_part(where: str, part: Any, ids: set[int]) -> None:
    for node in _nodes(where, part):
        kind, pattern = node.get("type"), node.get("pattern")
        if where.endswith(": normalizer") and kind is not None and kind not in NORMALIZERS:
            raise ValueError(f"{where} is a {kind!r:.100}, allowed are {', '.join(NORMALIZERS)}")
        if kind == "Prepend" and node.get("prepend") != "▁":
            raise ValueError(f"{where} prepends {node.get('prepend')!r:.100}, allowed is '▁'")
        if kind == "Replace":
            found = pattern.get("String") if isinstance(pattern, dict) else None, node.get("content")
            if found not in REPLACEMENTS and "Regex" not in (pattern or ()):
                raise ValueError(f"{where} replaces {found!r:.100}, allowed are {REPLACEMENTS}")
        regex = node.get("Regex")
        if isinstance(regex, str) and regex not in KNOWN_PATTERNS:
            raise ValueError(
                f"{where} has the unknown pattern {regex!r:.200}; allowed are DeepSeek's, cl100k's and Moonlight's. "
                "If you trust it, load the folder with transformers.PreTrainedTokenizerFast"
            )
        if isinstance(node.get("ids"), list) and not all(_is_id(each) and each in ids for each in node["ids"]):
            raise ValueError(f"{where} adds ids {node['ids']!r:.100}, allowed are those of tokens")


def _nodes(where: str, part: Any) -> Iterator[dict[str, Any]]:
    """Every object at any depth, level by level; refuses long lists and strings, and deep nesting."""
    level = [part] if isinstance(part, dict | list) else []
    for _ in range(MAX_DEPTH):
        following: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                yield node
            children = list(node.values() if isinstance(node, dict) else node)
            if isinstance(node, list) and len(node) > MAX_PART_LIST:
                raise ValueError(f"{where} has a list of {len(node)} entries, allowed are {MAX_PART_LIST}")
            if text := next((c for c in children if isinstance(c, str) and len(c) > MAX_PART_TEXT), None):
                raise ValueError(f"{where} has a text of {len(text)} characters, allowed are {MAX_PART_TEXT}")
            following += [child for child in children if isinstance(child, dict | list)]
        level = following
    if level:
        raise ValueError(f"{where} is nested too deeply, allowed are {MAX_DEPTH} levels")


def check_tokenizer_config(file: str | PathLike) -> dict[str, Any]:
    """The content of a `tokenizer_config.json` whose lists, numbers and texts have sane sizes.

    Raises:
        ValueError: names `file`, the field, what was found and what is allowed.
    """
    config = read_json(file)
    for key, value in config.items():
        if value is not None and (key in _NOT_IN_A_FILE or key.startswith("_json_")):
            raise ValueError(f"{file}: {key} is {value!r:.100}, allowed is no such key in a file")
    length = config.get("model_max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int | float) or not length > 0):
        raise ValueError(f"{file}: model_max_length is {length!r:.100}, allowed is a number above 0")
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(config.get(key), list | dict) and len(config[key]) > MAX_EXTRA_TOKENS:
            raise ValueError(f"{file}: {key} has {len(config[key])} entries, allowed are {MAX_EXTRA_TOKENS}")
    added = config.get("added_tokens_decoder", {})
    if not isinstance(added, dict) or len(added) > MAX_ADDED_TOKENS:
        raise ValueError(f"{file}: added_tokens_decoder must be an object of at most {MAX_ADDED_TOKENS} entries")
    for token_id in added:
        if not (token_id.isdecimal() and len(token_id) < 10 and _is_id(int(token_id))):
            raise ValueError(f"{file}: added_tokens_decoder has id {token_id!r:.100}, allowed are 0 to {MAX_TOKEN_ID}")
    _check_templates(f"{file}: chat_template", config.get("chat_template"))
    return config


def _check_templates(where: str, templates: Any) -> None:
    if isinstance(templates, list):
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in templates):
            raise ValueError(f"{where} is a list, allowed are entries with a name and a template")
        templates = [entry.get("template") for entry in templates]
    elif isinstance(templates, dict):
        templates = list(templates.values())
    for template in templates if isinstance(templates, list) else [templates]:
        if template is not None and not isinstance(template, str):
            raise ValueError(f"{where} is a {type(template).__name__}, allowed is a text")
        if template is not None and len(template) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError(f"{where} has {len(template)} characters, allowed are {MAX_TEMPLATE_CHARACTERS}")


def check_template_file(file: str | PathLike) -> None:
    """Refuse a chat template that is too long or not UTF-8; `ValueError` names `file`."""
    if (size := Path(file).stat().st_size) > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(f"{file}: the chat template has {size} bytes, allowed are {MAX_TEMPLATE_CHARACTERS}")
    try:
        Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: the chat template is not UTF-8 ({error})") from None


def check_vocab(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer with ids that a model has no embedding for (they would be an index error in the first step).

    Args:
        tokenizer: any transformers tokenizer.
        vocab_size: `config.vocab_size`; larger than needed is fine (official V3: 129280 for ids up to 128814).

    Raises:
        ValueError: names the token and both numbers.
    """
    token, token_id = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if token_id >= vocab_size:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(
            f"tokenizer {name!r}: token {token!r} has id {token_id}, but "
            f"config.vocab_size is {vocab_size}; it must be at least {token_id + 1}"
        )
