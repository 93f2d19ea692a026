"""Training a new vocabulary with DeepSeek's pre-tokenizer and special tokens."""

import logging
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .files import MAX_TOKEN_ID
from .tokenizer import DeepseekV3Tokenizer
from .vocabulary import (
    LEADING,
    TRAILING,
    added_token,
    build_normalizer,
    build_pre_tokenizer,
    placeholder,
)

logger = logging.getLogger(__name__)

MIN_VOCAB_SIZE = len(LEADING) + 256 + len(TRAILING)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    min_frequency: int = 2,
    add_bos_token: bool = True,
    add_eos_token: bool = False,
    model_max_length: int | None = None,
) -> DeepseekV3Tokenizer:
    """A byte-level BPE learned from `texts`, in the layout of DeepSeek's own vocabulary.

    Ids: 0, 1, 2 are BOS, EOS and padding, then all 256 bytes (so any text can be written), then the learned tokens,
    and the 17 chat, FIM, thinking and tool tokens last. Text too small for that many merges leaves ids over, which
    become placeholders as in the official file, with a warning: the number of ids is `vocab_size` in any case, and
    `config.vocab_size` can be the same number. The same texts give the same file.

    Args:
        texts: strings, read once; a generator is fine.
        vocab_size: number of ids, special tokens included; 276 to 1048576.
        min_frequency: how often a pair must occur to become a token.
        add_bos_token: as in `DeepseekV3Tokenizer`; true as in DeepSeek-V3, whose training documents begin with BOS.
        add_eos_token: as in `DeepseekV3Tokenizer`.
        model_max_length: the model's context in tokens, for `truncation=True`; None for no limit.

    Raises:
        ValueError: `vocab_size` is outside its range, `texts` is one string, holds no character, or holds something
            that is not text (naming its position).
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_TOKEN_ID + 1:
        raise ValueError(f"vocab_size is {vocab_size}; allowed are {MIN_VOCAB_SIZE} to {MAX_TOKEN_ID + 1}")
    if isinstance(texts, str):
        raise ValueError("texts is one string; pass a list or another iterable of strings")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = build_normalizer()
    tokenizer.pre_tokenizer = build_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TRAILING),
        min_frequency=min_frequency,
        special_tokens=[added_token(token) for token in LEADING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_checked(texts), trainer)

    learned = tokenizer.get_vocab_size()
    spare = vocab_size - len(TRAILING) - learned
    if spare:
        logger.warning("texts gave %d of %d tokens; %d ids are placeholders", learned, vocab_size, spare)
    tokenizer.add_tokens([added_token(token) for token in (*map(placeholder, range(spare)), *TRAILING)])
    return DeepseekV3Tokenizer(
        tokenizer_object=tokenizer,
        add_bos_token=add_bos_token,
        add_eos_token=add_eos_token,
        model_max_length=model_max_length,
    )


def _checked(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{index}] is a {type(text).__name__}, a str is expected")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"texts[{index}] is not Unicode text: {error}") from error
        empty = empty and not text
        yield text
    if empty:
        raise ValueError("texts holds no character to learn from")
