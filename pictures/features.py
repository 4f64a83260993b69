"""Vision features and the errors of their predictions as colours; used by `llava-next-ar visualize` and `demo`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .strip import ColourBar, StripRow, colour_scale, frame_strip, patch_colours, time_labels

# OKLab (https://bottosson.github.io/posts/oklab/): lightness, green to red and blue to yellow, to linear red, green, blue.
_LAB_TO_LMS = np.array(
    [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.2914855480],
    ]
)
_LMS_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)
_LIGHTNESS, _CHROMA = (0.3, 0.92), 0.13


@dataclass(frozen=True)
class FeatureBasis:
    """Map from features to colours: their first three principal components, and the range of each.

    The first is shown as lightness, the second as blue to yellow, the third as green to red. Equal features have equal
    colours in all pictures of one basis.

    Attributes:
        mean: `[D]`.
        components: `[3, D]`, orthonormal, the strongest first; zeros where features have fewer directions.
        low, high: `[3]`, 1st and 99th percentile of the fitted features along each.
        explained: `[3]`, share of the fitted features' variance along each.
    """

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray
    explained: np.ndarray

    @classmethod
    def fit(cls, features: Sequence[np.ndarray]) -> "FeatureBasis":
        """The principal components of `[P_i, D]` arrays together."""
        stacked = np.concatenate(features).astype(np.float64)
        mean = stacked.mean(0)
        variances, directions = np.linalg.eigh(np.cov(stacked - mean, rowvar=False, bias=True))
        components = np.zeros((3, len(mean)))
        strongest = directions.T[::-1][:3]
        # The sign of a direction is arbitrary: a positive largest entry makes colours reproducible.
        signs = np.sign(np.take_along_axis(strongest, np.abs(strongest).argmax(1)[:, None], axis=1))
        components[: len(strongest)] = strongest * signs
        low, high = np.percentile((stacked - mean) @ components.T, [1, 99], axis=0)
        explained = np.zeros(3)
        explained[: len(strongest)] = variances[::-1][:3].clip(0) / max(variances.sum(), 1e-12)
        return cls(mean, components, low, high, explained)

    def coordinates(self, features: np.ndarray) -> np.ndarray:
        """`[..., D]` -> `[..., 3]` along the components."""
        return (features.astype(np.float64) - self.mean) @ self.components.T

    def colours(self, features: np.ndarray) -> np.ndarray:
        """`[..., D]` -> `[..., 3]` red, green and blue in 0 to 1; values beyond the range have the colour of its end."""
        share = (self.coordinates(features) - self.low) / np.maximum(self.high - self.low, 1e-9)
        light, blue_yellow, green_red = np.moveaxis(np.clip(share, 0, 1), -1, 0)
        lightness = _LIGHTNESS[0] + light * (_LIGHTNESS[1] - _LIGHTNESS[0])
        lab = np.stack([lightness, (2 * green_red - 1) * _CHROMA, (2 * blue_yellow - 1) * _CHROMA], axis=-1)
        linear = np.clip((lab @ _LAB_TO_LMS.T) ** 3 @ _LMS_TO_RGB.T, 0, 1)
        return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def features_of(prediction: Any) -> dict[str, list[np.ndarray]]:
    """True features of all frames, and predicted and copied ones of all but the first: each `[h, w, Dv]`.

    Args:
        prediction: a `NextFramePrediction`. The first frame is not predicted; its true features are the copy baseline of the
            second frame.
    """

    def on_grids(patches: Sequence[Any]) -> list[np.ndarray]:
        return [
            own.float().cpu().numpy().reshape(*grid, -1) for own, grid in zip(patches, prediction.grids, strict=True)
        ]

    copied = on_grids(prediction.copies)
    true = [copied[0], *on_grids(prediction.targets)]
    return {"true": true, "predicted": on_grids(prediction.predictions), "copied": copied}


def fit_basis(features: dict[str, list[np.ndarray]]) -> FeatureBasis:
    """Fit one basis for all features on the true ones alone."""
    return FeatureBasis.fit([frame.reshape(-1, frame.shape[-1]) for frame in features["true"]])


def film_rows(frames: np.ndarray, features: dict[str, list[np.ndarray]], basis: FeatureBasis) -> list[StripRow]:
    """Rows of a strip: frames `[T, H, W, 3]`, then true features, predicted ones, and those copied from the frame before."""
    coloured = {name: [basis.colours(frame) for frame in some] for name, some in features.items()}
    return [
        StripRow(name="frame", pictures=list(frames)),
        StripRow(name="true\nfeatures", pictures=coloured["true"]),
        StripRow(name="predicted", pictures=[None, *coloured["predicted"]]),
        StripRow(name="copied\n(baseline)", pictures=[None, *coloured["copied"]]),
    ]


def error_scale(surprise: Any) -> ScalarMappable:
    """Scale for the errors of predicting and of copying, up to their 98th percentile."""
    errors = np.concatenate([some.cpu().numpy().ravel() for some in (*surprise.errors, *surprise.copy_errors)])
    return colour_scale("OrRd", Normalize(0, max(float(np.percentile(errors, 98)), 1e-9)))


def error_rows(frames: np.ndarray, surprise: Any) -> tuple[list[StripRow], ColourBar]:
    """Rows of the errors of predicting and of copying, with the mean of each frame, and their colour bar.

    Args:
        frames: `[T, H, W, 3]`.
        surprise: a `VideoSurprise` of them.
    """
    scale = error_scale(surprise)
    rows = []
    for name, errors in (("error of\npredicting", surprise.errors), ("error of\ncopying", surprise.copy_errors)):
        errors = [error.cpu().numpy() for error in errors]
        pictures = [patch_colours(frame, error, scale) for frame, error in zip(frames[1:], errors, strict=True)]
        captions = ["", *(f"{error.mean():#.3g}" for error in errors)]
        rows.append(StripRow(name=name, pictures=[None, *pictures], captions=captions))
    label = "squared error of a patch, mean over features (numbers: mean over patches)"
    return rows, ColourBar(scale=scale, label=label, extend="max")


def film_figure(
    frames: np.ndarray,
    seconds: Sequence[float],
    features: dict[str, list[np.ndarray]],
    basis: FeatureBasis,
    title: str,
) -> Figure:
    """Frames above their features; `title` of the whole."""
    return frame_strip(film_rows(frames, features, basis), time_labels(seconds), title=title)


def error_figure(frames: np.ndarray, seconds: Sequence[float], surprise: Any, title: str) -> Figure:
    """Frames above the errors of predicting and of copying them; `title` of the whole."""
    rows, bar = error_rows(frames, surprise)
    rows = [StripRow(name="frame", pictures=list(frames)), *rows]
    return frame_strip(rows, time_labels(seconds), title=title, bars=[bar])
