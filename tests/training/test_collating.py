"""Collating and checking samples walks over their pixels as rarely as it can."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from llava_next_ar.training.collator import LlavaVideoCollator


class _Writes(TorchDispatchMode):
    """Numbers that operations write, and the most that one of them reads."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        written = isinstance(result, torch.Tensor) and not func.is_view and "new_empty" not in str(func)
        self.written += result.numel() if written else 0
        return result


def make_sample(num_frames: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.arange(1, 5),
        "labels": torch.arange(1, 5),
        "pixel_values_videos": torch.randn(1, num_frames, 3, 32, 32),
        "video_frame_mask": torch.ones(1, num_frames, dtype=torch.bool),
    }


def collate(*lengths: int) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], float]:
    samples = [make_sample(length) for length in lengths]
    with _Writes() as writes:
        batch = LlavaVideoCollator(0)(samples)
    return batch, [sample["pixel_values_videos"] for sample in samples], writes.written / (3 * 32 * 32)


def test_one_sample_is_not_copied():
    batch, (pixels,), frames = collate(8)
    assert batch["pixel_values_videos"].data_ptr() == pixels.data_ptr()
    assert frames < 0.1


def test_several_samples_are_copied_once():
    batch, pixels, frames = collate(8, 8)
    assert torch.equal(batch["pixel_values_videos"], torch.cat(pixels))
    assert 16 <= frames < 16.1


def test_only_padding_is_filled():
    """All of the batch was filled with zeros first, and then written again."""
    batch, pixels, frames = collate(8, 5)
    assert torch.equal(batch["pixel_values_videos"][0], pixels[0][0])
    assert torch.equal(batch["pixel_values_videos"][1, :5], pixels[1][0])
    assert not batch["pixel_values_videos"][1, 5:].any()
    assert batch["video_frame_mask"].sum(1).tolist() == [8, 5]
    assert 16 <= frames < 16.1


def collate_and_report(samples: list) -> dict[str, torch.Tensor]:
    batch = LlavaVideoCollator(0)(samples)
    return {**batch, "is_shared": torch.tensor(batch["pixel_values_videos"].is_shared())}


@pytest.mark.parametrize("lengths", [(8, 8), (8, 5)])
def test_a_worker_writes_a_batch_where_the_trainer_reads_it(lengths):
    """Else the batch is copied once more, into shared memory, on its way out of the worker."""
    samples = [make_sample(length) for length in lengths]
    (batch,) = DataLoader(samples, batch_size=2, num_workers=1, collate_fn=collate_and_report)
    expected = LlavaVideoCollator(0)(samples)
    assert batch.pop("is_shared") and batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert batch["pixel_values_videos"].is_contiguous() and not expected["pixel_values_videos"].is_shared()
