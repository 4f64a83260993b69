"""Media that entries of a data set name."""

import numpy as np
import pytest
from PIL import Image

from llava_next_ar.training.entries import MediaFolders


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_is_a_video_and_a_still_picture_is_not(tmp_path, suffix):
    first, *others = [Image.fromarray(np.full((8, 8, 3), index * 50, np.uint8)) for index in range(3)]
    first.save(tmp_path / f"animated.{suffix}", save_all=True, append_images=others, duration=100)
    first.save(tmp_path / f"still.{suffix}")
    folders = MediaFolders(video_root=tmp_path, image_root=tmp_path)
    assert folders.locate(f"animated.{suffix}", "video") == str(tmp_path.resolve() / f"animated.{suffix}")
    if suffix != "gif":
        with pytest.raises(ValueError, match=f"video 'still.{suffix}' is an image; give it under 'image'"):
            folders.locate(f"still.{suffix}", "video")
    with pytest.raises(ValueError) as error:
        folders.locate(f"data:image/{suffix};base64,{'QUJD' * 100}", "image")
    assert "is a URL" in str(error.value) and "QUJD" not in str(error.value)
