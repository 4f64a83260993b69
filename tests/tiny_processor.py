"""A processor for the tiny models of tiny.py."""

from typing import Any

from tiny_tokenizer import character_tokenizer

from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor


def tiny_processor(config: Any, **video_kwargs: Any) -> LlavaNextARProcessor:
    return LlavaNextARProcessor.for_config(config, character_tokenizer(), **video_kwargs)
