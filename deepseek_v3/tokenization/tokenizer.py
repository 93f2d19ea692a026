"""DeepSeek-V3's byte-level BPE tokenizer as a transformers fast tokenizer."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from .chat_template import CHAT_TEMPLATE
from .files import check_template_file, check_tokenizer_config, check_tokenizer_file, read_json
from .fim import fim_text
from .templates import from_file, with_limits
from .vocabulary import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, PAD, build_post_processor

_STOCK_CLASS = "PreTrainedTokenizerFast"  # the one name that transformers 4 and 5 both resolve without this package
_LOCAL_KEYS = ("is_local", "local_files_only", "backend")  # facts about this machine that stock would save


class DeepseekV3Tokenizer(PreTrainedTokenizerFast):
    """Loads DeepSeek's own `tokenizer.json`, or one from `train_tokenizer`, with the ids of the `tokenizers` library.

    What differs from the stock class on the same folder:

    - **BOS and EOS.** Stock transformers 5 ignores `add_bos_token` in `tokenizer_config.json`. Here the order is: the
      argument, then that file (DeepSeek-V3 says true, R1-style files say false), then the post-processor in
      `tokenizer.json`. The outcome is written into the post-processor, so a saved folder behaves the same everywhere.
      The chat template writes BOS itself and is encoded without special tokens, so it is never doubled.
    - **Padding.** The official config pads with EOS, and a trainer that masks padding then never teaches a model to
      stop. A missing or EOS padding token becomes `<｜▁pad▁｜>` where the vocabulary has it, unless `pad_token` is
      passed (at every load). `padding_side` is left unless the folder says otherwise: new tokens must
      follow text, not padding.
    - **Chat template.** A folder's own is kept; without one it is `CHAT_TEMPLATE`. A folder's own that is not
      DeepSeek's is rendered with limited time and memory (see `templates`).
    - **Checks.** Damaged or hostile files are a `ValueError` that names the file.

    Text with a lone surrogate (half a UTF-16 pair) has no UTF-8 form; encoding it is an error, never a silent loss.

    Args:
        add_bos_token: put BOS before each text, unless `add_special_tokens=False`; None leaves it to the files.
        add_eos_token: put EOS after each text, likewise.
        **kwargs: those of `transformers.PreTrainedTokenizerFast`.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    padding_side = "left"

    def __init__(
        self, *args: Any, add_bos_token: bool | None = None, add_eos_token: bool | None = None, **kwargs: Any
    ) -> None:
        pad_is_chosen = kwargs.pop("pad_token_is_chosen", "pad_token" in kwargs)
        kwargs.setdefault("padding_side", self.padding_side)  # an init argument is saved, a class attribute is not
        kwargs["chat_template"] = kwargs.get("chat_template") or CHAT_TEMPLATE
        super().__init__(*args, **kwargs)
        backend = self.backend_tokenizer
        for name, token in (("bos_token", BOS), ("eos_token", EOS)):
            if getattr(self, name) is None and backend.token_to_id(token) is not None:
                setattr(self, name, token)
        if (
            not pad_is_chosen
            and self.pad_token_id in (None, self.eos_token_id)
            and backend.token_to_id(PAD) is not None
        ):
            self.pad_token = PAD

        added = backend.encode("").ids  # what the file's own post-processor adds
        self._add_bos_token, self._add_eos_token = self.bos_token_id in added, self.eos_token_id in added
        wanted = (
            self._add_bos_token if add_bos_token is None else add_bos_token,
            self._add_eos_token if add_eos_token is None else add_eos_token,
        )
        if wanted != (self._add_bos_token, self._add_eos_token):
            self._add_bos_token, self._add_eos_token = wanted
            self.update_post_processor()

    def update_post_processor(self) -> None:
        """Write the current `add_bos_token` and `add_eos_token` into the post-processor.

        Raises:
            ValueError: one of them is set and the tokenizer has no such token.
        """
        tokens = []
        for name, wanted in (("bos_token", self.add_bos_token), ("eos_token", self.add_eos_token)):
            if wanted and getattr(self, name) is None:
                raise ValueError(f"add_{name} is set, but the tokenizer has no {name}")
            tokens.append((getattr(self, name), getattr(self, f"{name}_id")) if wanted else None)
        self.backend_tokenizer.post_processor = build_post_processor(*tokens)

    apply_chat_template = with_limits(PreTrainedTokenizerFast.apply_chat_template)

    def encode_fim(
        self, prefix: str, suffix: str, middle: str | None = None, add_special_tokens: bool = True
    ) -> list[int]:
        """Fill-in-the-middle ids in PSM order, `<fim_begin>prefix<fim_hole>suffix<fim_end>middle` (V3 report, 4.1).

        Args:
            prefix: text before the hole.
            suffix: text after the hole.
            middle: text of the hole, for a training document; None for a prompt that a model completes.
            add_special_tokens: begin with BOS if `add_bos_token`, and end a training document with EOS.

        Raises:
            ValueError: the vocabulary has no FIM tokens.
        """
        if missing := {FIM_BEGIN, FIM_HOLE, FIM_END} - self.get_added_vocab().keys():
            raise ValueError(f"tokenizer {self.name_or_path!r} has no {', '.join(sorted(missing))}")
        ids = self.encode(fim_text(prefix, suffix, middle or ""), add_special_tokens=False)
        if not add_special_tokens:
            return ids
        bos = [self.bos_token_id] if self.add_bos_token else []
        return bos + ids + ([self.eos_token_id] if middle is not None else [])

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, *args: Any, **kwargs: Any
    ) -> "DeepseekV3Tokenizer":
        """As in transformers, for a folder or a Hub name, with the checks of the class.

        Raises:
            ValueError: a file is damaged, of the wrong kind, has ids beyond the limit or an unknown split pattern; the
                message names the file.
            OSError: there is no such folder or repository.
        """
        config_file = Path(pretrained_model_name_or_path, "tokenizer_config.json")
        if config_file.is_file():  # stock reads it before anything of ours runs
            check_tokenizer_config(config_file)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _from_pretrained(
        cls, resolved_vocab_files: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Stock's second step, with the files found (here or on the Hub) and nothing read yet."""
        file = resolved_vocab_files.get("tokenizer_file")
        if file is None:
            raise ValueError(
                f"{pretrained_model_name_or_path}: has no tokenizer.json, the only format this tokenizer reads"
            )
        check_tokenizer_file(file)
        config_file = resolved_vocab_files.get("tokenizer_config_file")
        config = check_tokenizer_config(config_file) if config_file else {}
        for key, path in resolved_vocab_files.items():
            if path is not None and key.startswith("chat_template"):
                check_template_file(path)
            elif path is not None and key in ("special_tokens_map_file", "added_tokens_file"):
                read_json(path)
        for key in ("add_bos_token", "add_eos_token"):
            if kwargs.get(key) is None and isinstance(config.get(key), bool):
                kwargs[key] = config[key]
        kwargs["pad_token_is_chosen"] = "pad_token" in kwargs
        try:
            tokenizer = super()._from_pretrained(resolved_vocab_files, pretrained_model_name_or_path, *args, **kwargs)
            if kwargs.get("chat_template") is None:
                tokenizer.chat_template = from_file(tokenizer.chat_template)
            return tokenizer
        except OSError:
            raise
        except BaseException as error:
            # The Rust library panics with a direct child of BaseException that it does not export.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{file}, or the tokenizer_config.json beside it, cannot be loaded: {error}") from error

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Hand the file to `__init__` as it is; stock takes it apart for a class with its own `__init__`."""
        return kwargs

    def _save_pretrained(
        self, save_directory: str | PathLike, file_names: tuple[str, ...], *args: Any, **kwargs: Any
    ) -> tuple[str, ...]:
        """Last step of `save_pretrained`, before any upload: make the config one for programs without this package."""
        config_file = Path(file_names[0])
        config = {key: value for key, value in read_json(config_file).items() if key not in _LOCAL_KEYS}
        # Stock 5 reads these from tokenizer.json; llama.cpp's converter and transformers 4 look here.
        config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        config["tokenizer_class"] = _STOCK_CLASS
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        config_file.write_text(text + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, *args, **kwargs)
