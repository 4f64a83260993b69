"""One model for all users of the app: each of its functions takes plain values, and returns or yields plain values."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...pictures.visualize import Clip, VisualizeSettings, read_clip
from .accelerator import IS_ZERO_GPU, on_gpu
from .chat import ConversationCaches, GenerationSettings, Prompt, conversation_of, prepare, stream_answer
from .expectation import Expectation, expectation_html, expectation_numbers, predict, without_head
from .live import MAX_LIVE_FRAMES, LiveReader

MAX_FRAMES = 64
MAX_IMAGINED = 8
Report = Callable[[float, str], Any]


def silent(share: float, text: str) -> None:
    """Report no progress."""


class ModelService:
    """A model and its processor, used by one call at a time.

    Args:
        model: in eval mode, on its device.
        processor: of the same checkpoint.
        name: of the checkpoint, to show.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model, processor, name
        self._lock = threading.Lock()
        self._caches = None if IS_ZERO_GPU else ConversationCaches()
        self._stream_answer, self._predict = on_gpu(self._answer_prompt), on_gpu(self._predict_clip)
        self._read_frame, self._read_frames = on_gpu(self._live_frame), on_gpu(self._live_frames)

    # -- Chat

    def answer(
        self, message: dict[str, Any], history: list[dict[str, Any]], settings: GenerationSettings, session: str
    ) -> Iterator[str]:
        """Yield the text of an answer up to each new word.

        Args:
            message: `text` and `files` of the new turn.
            history: earlier messages.
            session: of the user, whose last conversation is kept in a cache.

        Raises:
            ValueError, OSError: if the message is empty, or a file cannot be read.
        """
        prompt = prepare(self.processor, conversation_of(message, history), settings)
        yield from self._stream_answer(prompt, settings, session)

    def _answer_prompt(self, prompt: Prompt, settings: GenerationSettings, session: str) -> Iterator[str]:
        return (
            yield from stream_answer(self.model, self.processor, self._lock, prompt, settings, self._caches, session)
        )

    # -- Expectation

    def expect(
        self, video: str, num_frames: int | None, num_imagined: int, report: Report = silent
    ) -> tuple[Clip, Expectation]:
        """Predict the frames of a clip; see `expectation.predict`.

        Args:
            video: file.
            num_frames: frames of the clip; None leaves them to the processor.

        Raises:
            ValueError: if an argument is out of range, the video cannot be read or has one frame, or the model has no head.
            FileNotFoundError: if the file does not exist.
        """
        if not 0 <= num_imagined <= MAX_IMAGINED:
            raise ValueError(f"imagined frames are {num_imagined}, expected 0 to {MAX_IMAGINED}")
        clip = self._read_clip(video, report, num_frames=num_frames)
        report(0.3, "predicting each frame, and imagining the last ones" if num_imagined else "predicting each frame")
        return clip, self._predict(clip, num_imagined)

    def expectation_html(self, video: str, num_frames: int | None, num_imagined: int, report: Report = silent) -> Any:
        """HTML and numbers of a clip; raises as `expect`."""
        clip, expectation = self.expect(video, num_frames, num_imagined, report)
        report(0.85, "drawing")
        return expectation_html(clip, expectation), expectation_numbers(clip, expectation)

    def surprise(self, video: str, num_frames: int | None = None, num_imagined: int = 0) -> dict[str, Any]:
        """Numbers of a clip with those of each patch; raises as `expect`."""
        return expectation_numbers(*self.expect(video, num_frames, num_imagined), with_patches=True)

    def _read_clip(self, video: str, report: Report, **options: Any) -> Clip:
        """Read a clip for predictions: at most `MAX_FRAMES` frames, unless `options` set another limit."""
        reason = without_head(self.model)
        if reason is not None:
            raise ValueError(reason)
        if not video:
            raise ValueError("no video was given: upload one, or choose an example")
        if not Path(video).is_file():
            raise FileNotFoundError(f"no such file: {Path(video).name}")
        num_frames = options.get("num_frames")
        if num_frames is not None and not 2 <= num_frames <= MAX_FRAMES:
            raise ValueError(f"frames are {num_frames}, expected 2 to {MAX_FRAMES}")
        report(0.05, "reading the video")
        settings = VisualizeSettings(model=self.name, videos=(video,), **options)
        return read_clip(self.model, self.processor, video, settings, device="cpu")

    def _predict_clip(self, clip: Clip, num_imagined: int) -> Expectation:
        with self._lock:
            return predict(self.model, clip, num_imagined)

    # -- Live

    def run_file(self, video: str, fps: float, *, at_its_pace: bool = True) -> Iterator[tuple[str, LiveReader]]:
        """Read the frames of a file one by one; yield the page so far after each.

        Args:
            fps: frames a second of the video that are read, up to `MAX_LIVE_FRAMES` frames in all.
            at_its_pace: wait between frames as long as the video does; not on ZeroGPU, where time is short.

        Raises:
            ValueError: as `expect`, or if the head looks ahead.
        """
        if not 0 < fps <= 30:
            raise ValueError(f"frames per second are {fps:g}, expected more than 0 and at most 30")
        clip = self._read_clip(video, silent, fps=fps, max_frames=MAX_LIVE_FRAMES)
        yield from self._read_frames(clip, at_its_pace and not IS_ZERO_GPU)

    def _live_frames(self, clip: Clip, at_its_pace: bool) -> Iterator[tuple[str, LiveReader]]:
        reader = LiveReader(self.model, self.processor, total=len(clip.times))
        start, first = time.monotonic(), float(clip.times[0])
        for number, seconds in enumerate(clip.times):
            if at_its_pace:
                time.sleep(max(0.0, float(seconds) - first - (time.monotonic() - start)))
            frame_type = None if clip.frame_types is None else clip.frame_types[number]
            with self._lock:
                reader.read(self.model, clip.inputs["pixel_values_videos"][0, number], seconds, frame_type)
            yield reader.html(), None if IS_ZERO_GPU else reader

    def open_live(self) -> LiveReader:
        """A reader for the frames of a webcam.

        Raises:
            ValueError: if the model has no head, or one that looks ahead.
        """
        reason = without_head(self.model)
        if reason is not None:
            raise ValueError(reason)
        return LiveReader(self.model, self.processor, keeps_stream=not IS_ZERO_GPU)

    def watch(self, image: np.ndarray, seconds: float, reader: LiveReader) -> LiveReader:
        """Read one frame of a webcam.

        Args:
            image: `[H, W, 3]` uint8.
            seconds: its time.
            reader: of `open_live`.

        Returns:
            the reader with the frame; another object on ZeroGPU.

        Raises:
            ValueError: as `LiveReader.read`.
        """
        pixels = self.processor.video_processor(videos=[image[None]], return_tensors="pt")["pixel_values_videos"][0, 0]
        return self._read_frame(reader, pixels, torch.tensor(seconds, dtype=torch.float64))

    def _live_frame(self, reader: LiveReader, pixels: torch.Tensor, seconds: torch.Tensor) -> LiveReader:
        with self._lock:
            reader.read(self.model, pixels, seconds)
        return reader
