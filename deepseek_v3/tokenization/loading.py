"""The tokenizer of any checkpoint of this architecture, whatever its class."""

from os import PathLike, fspath

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file


def load_tokenizer(source: str | PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a Hub repository, with a padding token: EOS where it has none.

    It is read from tokenizer.json alone. Where the repository's own is code, which is not run, transformers would
    convert another file with a split pattern that it guesses.

    Raises:
        ValueError: no tokenizer.json, or one that cannot be loaded.
        OSError: there is no such folder or repository.
    """
    from transformers import AutoTokenizer  # here: the package enters itself there with what this room exports

    source = fspath(source)
    cached_file(source, "config.json")  # an error where there is nothing at all, or no connection to it
    if cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is None:
        others = "code of the repository's own is not run, and a conversion would guess"
        remedy = "tokenization.convert_tiktoken writes it for Moonlight and Kimi"
        raise ValueError(f"{source}: found no tokenizer.json; {others}: put it beside the weights ({remedy})")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
