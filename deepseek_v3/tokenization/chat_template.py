"""The chat template given to tokenizers that bring none (source and rules: `chat_template.jinja` beside this file)."""

from pathlib import Path

CHAT_TEMPLATE: str = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
