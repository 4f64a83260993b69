"""Code blocks of the documents; model_card.md is a template, read as the card of a checkpoint."""

import re
from pathlib import Path

from llava_next_ar.hub.model_card import build_card

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "model_card.md")


def read(document: str, checkpoint: Path | None = None) -> str:
    if document == "model_card.md" and checkpoint is not None:
        return str(build_card(checkpoint, "user/llava-next-ar"))
    return (ROOT / document).read_text()


def code_blocks(document: str, language: str, checkpoint: Path | None = None) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(document, checkpoint), flags=re.MULTILINE | re.DOTALL)
