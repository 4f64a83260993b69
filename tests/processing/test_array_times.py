"""Frames without a file are sampled by the times that their metadata give."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava_next_ar.processing import video_inputs
from llava_next_ar.processing.video_processing_llava_next_ar import LlavaNextARVideoProcessor

PLACES = [0, 1, 2, 30, 60, 90]  # at 0, 0.1, 0.2, 3, 6 and 9 seconds
UNEVEN = {"fps": 10.0, "total_num_frames": 100, "frames_indices": PLACES}
FRAMES = np.stack([np.full((8, 8, 3), 20 * number, np.uint8) for number in range(6)])
FORMS = {"array": FRAMES, "tensor": torch.from_numpy(FRAMES), "pictures": [Image.fromarray(frame) for frame in FRAMES]}


def taken(form: str, metadata: dict, **options) -> list[int]:
    """Return the frames that a call samples, found by their pixels; validates their times and indices."""
    processor = LlavaNextARVideoProcessor(size=8, do_normalize=False, do_rescale=False, **options)
    batch = processor([FORMS[form]], video_metadata=[metadata], return_metadata=True, return_tensors="pt")
    numbers = (batch["pixel_values_videos"][0, :, 0, 0, 0] / 20).round().int().tolist()
    if "fps" in metadata:
        places = [metadata.get("frames_indices", range(6))[number] for number in numbers]
        assert batch["video_metadata"][0].frames_indices == places
        assert batch["video_timestamps"][0].tolist() == pytest.approx([place / metadata["fps"] for place in places])
    return numbers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampling": "uniform_time", "num_frames": 4}, [0, 3, 4, 5]),  # nearest to 0, 3, 6, 9 s
        ({"sampling": "uniform", "num_frames": 4}, [0, 1, 3, 5]),  # by index
        ({"sampling": "fps_time", "fps": 0.5}, [0, 2, 3, 4]),  # on show at 0, 2, 4, 6 and 8 s
        ({"sampling": "fps_time", "fps": 0.5, "max_frames": 2}, [0, 5]),
    ],
)
def test_policies_by_time_go_by_the_places_of_frames(form, options, expected):
    assert taken(form, UNEVEN, **options) == expected


@pytest.mark.parametrize("form", FORMS)
def test_the_rate_of_the_metadata_is_that_of_the_frames(form):
    assert taken(form, {"fps": 4.0}, sampling="fps_time", fps=2.0) == [0, 2, 4]
    assert taken(form, {"fps": 4.0}, sampling="uniform_time", num_frames=2) == [0, 5]


@pytest.mark.parametrize("form", FORMS)
def test_without_a_rate_nothing_is_chosen_by_one(form):
    """As with the policy `fps`; evenly spaced in time needs no rate."""
    for metadata in ({}, {"frames_indices": PLACES}):
        for policy in ("fps", "fps_time"):
            with pytest.raises(ValueError, match=f"policy '{policy}' needs the frame rate of the video"):
                taken(form, metadata, sampling=policy, fps=1.0)
    assert taken(form, {"frames_indices": PLACES}, sampling="uniform_time", num_frames=4) == [0, 3, 4, 5]


@pytest.mark.parametrize("form", ["array", "pictures"])
def test_limits_in_seconds_go_by_the_places_of_frames(form):
    options = {"do_rescale": False, "do_normalize": False, "size": 8}
    processor = LlavaNextARVideoProcessor(num_frames=6, **options)
    sampling = processor.sampling_for(video_start=0.2, video_end=6.0)
    clip = video_inputs.read_clip(
        FORMS[form],
        video_inputs.check_metadata(UNEVEN),
        sampling,
        do_convert_rgb=True,
        float_range=(0, 255),
        input_data_format=None,
        sizes=None,
        backend="auto",
    )
    assert clip.timestamps.tolist() == pytest.approx([0.2, 3.0, 6.0])
