"""Expectations of a model about a clip: predicted features, surprise and imagined frames, as numbers and as HTML."""

from dataclasses import dataclass
from typing import Any

import torch

from ...modeling.frame_rollout import ImaginedFrames
from ...modeling.frame_surprise import VideoSurprise
from ...modeling.reconstruction_metrics import NextFramePrediction
from ...pictures.features import error_rows, features_of, film_rows, fit_basis
from ...pictures.strip import StripRow, time_labels
from ...pictures.surprise import copying_surprise, map_rows, surprise_of
from ...pictures.visualize import Clip, plain
from .drawing import compared, data_uri, section, skill_html, strip_html, table_html, timeline_html


@dataclass(frozen=True)
class Expectation:
    """Predictions of the frames of a clip. All tensors are on the CPU.

    Attributes:
        prediction: of each frame but the first, from the frames before it.
        imagined: of the last frames, each from the frames imagined before it; None if `not_imagined`.
        not_imagined: reason.
        notes: facts about the head that change the meaning of the numbers.
    """

    prediction: NextFramePrediction
    imagined: ImaginedFrames | None
    not_imagined: str | None
    notes: tuple[str, ...]


def without_head(model: Any) -> str | None:
    """Reason why a model cannot predict; None if it can."""
    if model.autoregressive_module is None:
        return "this checkpoint has no head that predicts (enable_autoregressive=False): only the chat works with it"
    return None


@torch.inference_mode()
def predict(model: Any, clip: Clip, num_imagined: int) -> Expectation:
    """Predict each frame of a clip, and imagine its last ones.

    Args:
        clip: with inputs on any device.
        num_imagined: number of last frames to hold back and imagine; 0 for none.

    Raises:
        ValueError: if the model has no head, or the clip has one frame alone.
    """
    reason = without_head(model)
    if reason is not None:
        raise ValueError(reason)
    if len(clip.frames) < 2:
        raise ValueError("the clip has one frame alone, so that no frame can be predicted: choose two frames or more")
    inputs = {name: value.to(model.device) for name, value in clip.inputs.items()}
    (prediction,) = model.predict_next_frames(**inputs)
    imagined, not_imagined = None, "no frames were asked for" if num_imagined < 1 else None
    if num_imagined >= 1:
        try:
            (imagined,) = model.imagine(num_imagined, hold_back=True, **inputs)
        except ValueError as error:  # a clip that is too short, or a head that cannot be fed its own predictions
            not_imagined = str(error)
    notes = []
    if not model.config.autoregressive_config.use_frame_causal_mask:
        notes.append(
            "The head has read the frames that it predicts (use_frame_causal_mask=False): this is not foresight."
        )
    if all(torch.equal(own, copy) for own, copy in zip(prediction.predictions, prediction.copies, strict=True)):
        notes.append("Each prediction is the frame before it: this head has not been trained.")
    return Expectation(on_cpu(prediction), on_cpu(imagined), not_imagined, tuple(notes))


def on_cpu(result: Any) -> Any:
    """A result with all of its tensors on the CPU, also those in lists and dictionaries."""
    if isinstance(result, torch.Tensor):
        return result.cpu()
    if isinstance(result, list):
        return [on_cpu(entry) for entry in result]
    if isinstance(result, dict):
        return {name: on_cpu(entry) for name, entry in result.items()}
    if isinstance(result, (NextFramePrediction, ImaginedFrames, VideoSurprise)):
        return type(result)(**on_cpu(vars(result)))
    return result


def expectation_numbers(clip: Clip, expectation: Expectation, *, with_patches: bool = False) -> dict[str, Any]:
    """Numbers of six digits, of JSON types.

    Args:
        with_patches: add `patches` (surprise), `errors` and `copy_errors` of each patch, `[h][w]`, to each frame.

    Returns:
        `metrics` of the clip; `frames`, for each predicted frame its number, time in the file, surprise, surprise of copying
        and errors; `imagined`, for each imagined frame its number, time and errors, or None; `not_imagined`; `notes`.
    """
    surprise = surprise_of(expectation.prediction, clip.times)
    metrics = expectation.prediction.frame_metrics
    frames = []
    for entry, frame in enumerate(surprise.frame_index.tolist()):
        own = {
            "frame": frame,
            "seconds": clip.times[frame].item(),
            "surprise": surprise.frames[entry].item(),
            "copying_surprise": copying_surprise(surprise)[entry],
            "error": metrics["mse"][entry].item(),
            "copy_error": metrics["copy_mse"][entry].item(),
        }
        if with_patches:
            for name in ("patches", "errors", "copy_errors"):
                own[name] = getattr(surprise, name)[entry]
        frames.append(own)
    imagined = None
    if expectation.imagined is not None:
        errors = expectation.imagined.frame_metrics()
        imagined = [
            {
                "frame": frame,
                "seconds": clip.times[frame].item(),
                "error": errors["mse"][ahead].item(),
                "copy_error": errors["copy_mse"][ahead].item(),
                "straight_line_error": errors["linear_mse"][ahead].item(),
            }
            for ahead, frame in enumerate(expectation.imagined.frame_index.tolist())
        ]
    return plain(
        {
            "metrics": expectation.prediction.metrics,
            "frames": frames,
            "imagined": imagined,
            "not_imagined": expectation.not_imagined,
            "notes": list(expectation.notes),
        }
    )


def expectation_html(clip: Clip, expectation: Expectation) -> str:
    """All pictures of a clip, each with a heading and an explanation."""
    prediction, seconds = expectation.prediction, clip.times.tolist()
    surprise, labels = surprise_of(prediction, clip.times), time_labels(seconds)
    features = features_of(prediction)
    basis = fit_basis(features)
    thumbnails = [data_uri(clip.frames[frame], is_photo=True) for frame in prediction.frame_index.tolist()]
    frame_row = StripRow(name="frame", pictures=list(clip.frames))
    ratio, ratio_bar = map_rows(clip.frames, surprise)
    errors, error_bar = error_rows(clip.frames, surprise)
    # Times on the axis are those of the file, as in the strips below.
    of_file = VideoSurprise(**{**vars(surprise), "seconds": surprise.seconds + clip.times[0]})
    parts = [
        skill_html(prediction.metrics, expectation.notes),
        section(
            "Surprise over time",
            "The error of each prediction, divided by the error of copying the frame before plus a floor. A low value means "
            "that the frame was expected.",
            timeline_html(thumbnails, of_file),
        ),
        section(
            "Surprise by patch",
            "Error of each patch against copying: orange is worse than copying, purple better, white as good.",
            strip_html([frame_row, *ratio], labels, [ratio_bar]),
        ),
        section(
            "True and predicted features",
            f"Features as colours: equal colours are equal features ({basis.explained.sum():.0%} of their variance is shown). "
            "Each column is predicted from the columns to its left.",
            strip_html([*film_rows(clip.frames, features, basis), *errors], labels, [error_bar]),
        ),
        section("Imagined frames", *_imagined(clip, expectation, basis)),
    ]
    return f"<div class=ar-expectation>{''.join(parts)}</div>"


_ERRORS = "Squared error by number of frames ahead. Straight line: features that go on changing as in the last two frames read."


def _imagined(clip: Clip, expectation: Expectation, basis: Any) -> tuple[str, str]:
    """Explanation and pictures of the rollout."""
    imagined = expectation.imagined
    if imagined is None:
        return f"Left out: {expectation.not_imagined}.", ""
    errors = {name: values.tolist() for name, values in imagined.frame_metrics().items()}
    count, frames = len(imagined.grids), imagined.frame_index.tolist()
    mean, copy = (sum(errors[name]) / count for name in ("mse", "copy_mse"))
    seen = "frame was" if count == 1 else f"{count} frames were"
    text = (
        f"The last {seen} held back and imagined, each from those imagined before it. The imagined features miss by "
        f"{compared(mean, copy)} copying the last frame that the model has read."
    )
    rows = [StripRow(name="frame", pictures=[clip.frames[frame] for frame in frames])]
    for name, some in (
        ("true\nfeatures", imagined.targets),
        ("imagined", imagined.predictions),
        ("copied\n(baseline)", imagined.copies),
    ):
        maps = [own.float().numpy().reshape(*grid, -1) for own, grid in zip(some, imagined.grids, strict=True)]
        rows.append(StripRow(name=name, pictures=[basis.colours(own) for own in maps]))
    table = table_html(
        ["ahead", "imagined", "copying", "straight line"],
        [
            [str(ahead + 1), *(f"{errors[name][ahead]:#.3g}" for name in ("mse", "copy_mse", "linear_mse"))]
            for ahead in range(count)
        ],
    )
    times = time_labels([clip.times[frame].item() for frame in frames])
    return text, strip_html(rows, times) + f"<p class=ar-note>{_ERRORS}</p>{table}"
