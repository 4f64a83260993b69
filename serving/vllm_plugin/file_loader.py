# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""A video loader for vLLM that leaves decoding and sampling to the processor of the checkpoint. Imports vLLM."""

from typing import Any

import numpy as np
from vllm.multimodal.video import VideoLoader

from .video_file import array_of_file

LOADER_NAME = "llava_next_ar"
_DEFAULT_NUM_FRAMES = 32  # vLLM passes it where nothing is given


class WholeFileLoader(VideoLoader):
    """Hands a file on as it is. Frames, times and frame types are then those of the checkpoint's own sampling."""

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int = _DEFAULT_NUM_FRAMES, **kwargs: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """(content as `[number of bytes]` uint8, metadata for vLLM).

        Raises:
            ValueError: if `media_io_kwargs` ask for a sampling: options of the processor do that here.
        """
        given = {**({} if num_frames == _DEFAULT_NUM_FRAMES else {"num_frames": num_frames}), **kwargs}
        if given:
            raise ValueError(
                f"media_io_kwargs of videos are not read, got {given}: vLLM does not decode videos of this model. Give "
                "options of the processor, for example mm_processor_kwargs={'num_frames': 8}"
            )
        return array_of_file(data), {"do_sample_frames": True}
