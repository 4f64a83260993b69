"""Usage of the package for type checkers; `make lint` checks it, and it is never run."""

from pathlib import Path

from typing_extensions import assert_type

from llava_next_ar.configuration.configuration_llava_next_ar import LlavaNextARConfig
from llava_next_ar.configuration.frame_token_layout import FrameTokenLayout
from llava_next_ar.hub.hub_code import code_files
from llava_next_ar.processing.video_frames import FrameSampling, VideoFrames, load_video

assert_type(code_files(), dict[str, bytes])
assert_type(LlavaNextARConfig().frame_token_layout, FrameTokenLayout)
assert_type(load_video(Path("clip.mp4"), FrameSampling(num_frames=4)), VideoFrames)
