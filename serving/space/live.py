"""Surprise of a video that is still running: frames go one by one through the model's stream, and the timeline grows."""

from typing import Any

import numpy as np
import torch

from ...modeling.frame_surprise import VideoSurprise
from ...pictures.strip import StripRow, unnormalise
from ...pictures.surprise import copying_surprise, map_rows
from .drawing import data_uri, strip_html, timeline_html
from .expectation import on_cpu

MAX_LIVE_FRAMES = 240


def text_before_video(processor: Any) -> torch.Tensor:
    """Tokens `[1, S]` of a prompt up to its video, without a question: the text that a stream reads first."""
    conversation = [{"role": "user", "content": [{"type": "video"}]}]
    text = processor.apply_chat_template(conversation, tokenize=False).partition(processor.video_token)[0]
    return processor.tokenizer(text, return_tensors="pt").input_ids


class LiveReader:
    """One running video: its stream, and what it has measured so far.

    Args:
        model, processor: of a checkpoint with a head.
        keeps_stream: read each frame once, with the earlier ones in the cache of the stream. False reads all frames again
            for each new one, for processes whose memory is lost between calls (ZeroGPU).
        total: frames that will come, to show; None if that is open.

    Raises:
        ValueError: if the head is off, or looks ahead.
    """

    def __init__(self, model: Any, processor: Any, *, keeps_stream: bool = True, total: int | None = None) -> None:
        self._prompt_ids = text_before_video(processor)
        self._stream = model.surprise_stream(self._prompt_ids) if keeps_stream else None
        self._total = total
        self._normalisation = (processor.video_processor.image_mean, processor.video_processor.image_std)
        self._frames: list[tuple[torch.Tensor, torch.Tensor, list[int] | None]] = []
        self._parts: list[VideoSurprise] = []
        self._thumbnails: list[str] = []
        self._last: np.ndarray | None = None
        self.num_frames = 0
        self.first_time = 0.0

    @property
    def is_full(self) -> bool:
        """True after `MAX_LIVE_FRAMES` frames: the cache of the language model grows with each frame."""
        return self.num_frames >= MAX_LIVE_FRAMES

    @torch.inference_mode()
    def read(self, model: Any, pixels: torch.Tensor, time: torch.Tensor, frame_type: int | None = None) -> None:
        """Read one frame.

        Args:
            pixels: `[3, H, W]`, as the video processor prepares them.
            time: scalar, seconds.
            frame_type: slow (0) or fast (1), if the video processor chose types.

        Raises:
            ValueError: if the time is not after that of the frame before, or the video is full.
        """
        if self.is_full:
            raise ValueError(f"a live video ends after {MAX_LIVE_FRAMES} frames: start it again")
        types = None if frame_type is None else [frame_type]
        if self._stream is not None:
            part = self._stream.read(pixels[None], time.reshape(1), types)
            self._parts += [on_cpu(part)] if len(part.frames) else []
        else:
            self._frames.append((pixels.cpu(), time.reshape(1).cpu(), types))
            stream = model.surprise_stream(self._prompt_ids)
            stacked, times = torch.stack([own[0] for own in self._frames]), torch.cat([own[1] for own in self._frames])
            types = None if frame_type is None else [own[2][0] for own in self._frames]
            self._parts = [on_cpu(stream.read(stacked, times, types))]
        self._last = unnormalise(pixels[None], *self._normalisation)[0]
        if self.num_frames:
            self._thumbnails.append(data_uri(self._last, is_photo=True))
        else:
            self.first_time = float(time)
        self.num_frames += 1

    def surprise(self) -> VideoSurprise:
        """Surprise of all frames so far but the first.

        Raises:
            ValueError: before the second frame.
        """
        if self.num_frames < 2:
            raise ValueError("a video has a surprise from its second frame on")
        return joined(self._parts)

    def html(self) -> str:
        """The newest frame with its patches, and the timeline so far."""
        if self._last is None:
            return ""
        if self.num_frames < 2:
            row = StripRow(name="frame", pictures=[self._last])
            note = f"<p class=ar-note>The first frame{self._progress()} is read; the next one is predicted.</p>"
            return f"<div class=ar-live>{note}{strip_html([row], ['newest'])}</div>"
        surprise = self.surprise()
        newest = VideoSurprise(
            **{name: value if name == "video_index" else value[-1:] for name, value in vars(surprise).items()}
        )
        ratio, bar = map_rows(np.stack([self._last] * 2), newest)
        rows = [
            StripRow(name="frame", pictures=[self._last]),
            StripRow(name=ratio[0].name, pictures=ratio[0].pictures[1:], captions=ratio[0].captions[1:]),
        ]
        text = (
            f"<p class=ar-headline>Frame {int(newest.frame_index)}, {float(newest.seconds):.1f} s: <b>surprise "
            f"{float(newest.frames):.2f}</b> (copying {copying_surprise(newest)[0]:.2f})</p>"
        )
        text += f"<p class=ar-note>{self.num_frames}{self._progress()} frames are read.</p>"
        content = timeline_html(self._thumbnails, surprise) + strip_html(rows, ["newest"], [bar])
        return f"<div class=ar-live>{text}{content}</div>"

    def _progress(self) -> str:
        return "" if self._total is None else f" of {self._total}"


def joined(parts: list[VideoSurprise]) -> VideoSurprise:
    """Surprise of consecutive parts of one video as that of the whole."""
    fields: dict[str, Any] = {}
    for name in ("frame_index", "seconds", "frames", "floors"):
        fields[name] = torch.cat([getattr(part, name) for part in parts])
    for name in ("patches", "errors", "copy_errors"):
        fields[name] = [own for part in parts for own in getattr(part, name)]
    return VideoSurprise(**fields)
