# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Content of a video file on its way through vLLM, which expects decoded frames there.

The content travels as an array `[number of bytes]` uint8, since vLLM hashes arrays by all of their values. The processor
gets a file object whose text form does not show the content: vLLM writes the arguments of a processor into its errors.
"""

import io
from typing import Any

import numpy as np


class VideoFile(io.BytesIO):
    """A video file in memory; messages show its size alone."""

    def __repr__(self) -> str:
        return f"<video file of {len(self.getbuffer())} bytes>"

    __str__ = __repr__


def array_of_file(content: bytes) -> np.ndarray:
    """The content of a file as `[number of bytes]` uint8, not copied."""
    return np.frombuffer(content, dtype=np.uint8)


def open_array(video: Any) -> Any:
    """A `VideoFile` of what `array_of_file` made; other videos (decoded frames) stay as they are."""
    return VideoFile(video.tobytes()) if isinstance(video, np.ndarray) and video.ndim == 1 else video
