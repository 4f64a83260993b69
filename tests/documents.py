"""Code blocks of the documents; model_card.md is a template, read as the card of a checkpoint."""

import re
from pathlib import Path

from llava_next_ar.hub.model_card import build_card

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
DOCUMENTS = (*PAGES, "model_card.md")


def read(document: str, checkpoint: Path | None = None) -> str:
    if document == "model_card.md" and checkpoint is not None:
        return str(build_card(checkpoint, "user/llava-next-ar"))
    return (ROOT / document).read_text()


def code_blocks(document: str, language: str, checkpoint: Path | None = None) -> list[str]:
    """Blocks of a language, without the indentation of a list that they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", read(document, checkpoint), flags=re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indentation}", "", block, flags=re.MULTILINE) for indentation, block in found]


def commands(document: str) -> list[str]:
    """Lines of the bash blocks, continued lines joined, comments left out."""
    lines = [line for block in code_blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
