"""Geometric signals of a video's path through a frozen feature space: nothing is learned.

After GeoPhys (arXiv 2606.20707), which separates possible from impossible videos by five signals of frozen per-frame features.
They are the control for any score that a trained model gives: a surprise that separates no better than these says nothing about
the model.

Shape letters: T frames, D features of a frame.
"""

import numpy as np

SIGNALS = ("step size", "turning angle", "angle variance", "acceleration", "linear residual")
_SMALL = 1e-12


def geometric_signals(features: np.ndarray) -> dict[str, np.ndarray]:
    """Each of `SIGNALS` by frame, `[T]`; NaN at frames for which a signal is not defined.

    | signal | value at frame t | first frame |
    |---|---|---|
    | step size | length of the step from t - 1 to t | 1 |
    | turning angle | radians between the last two steps | 2 |
    | angle variance | variance of the turning angles of the whole clip, which belongs to no event | 0 alone |
    | acceleration | length of the difference of the last two steps | 2 |
    | linear residual | distance to the straight line that fits all frames before t best, extrapolated to t | 2 |

    Args:
        features: `[T, D]`.

    Raises:
        ValueError: unless there are at least three frames.
    """
    if features.ndim != 2 or len(features) < 3:
        raise ValueError(f"features are {list(features.shape)}, expected [T, D] with T of at least 3")
    points = features.astype(np.float64)
    steps = np.diff(points, axis=0)  # [T - 1, D]
    lengths = np.linalg.norm(steps, axis=1)
    cosines = (steps[1:] * steps[:-1]).sum(1) / np.maximum(lengths[1:] * lengths[:-1], _SMALL)
    angles = np.arccos(np.clip(cosines, -1, 1))
    signals = {name: np.full(len(points), np.nan) for name in SIGNALS}
    signals["step size"][1:] = lengths
    signals["turning angle"][2:] = angles
    signals["angle variance"][0] = angles.var()
    signals["acceleration"][2:] = np.linalg.norm(np.diff(steps, axis=0), axis=1)
    signals["linear residual"][2:] = [
        np.linalg.norm(points[t] - _extrapolated(points[:t])) for t in range(2, len(points))
    ]
    return signals


def _extrapolated(points: np.ndarray) -> np.ndarray:
    """The next point `[D]` of the least-squares line through `[t, D]`."""
    times = np.arange(len(points)) - (len(points) - 1) / 2
    slope = times @ points / (times @ times)
    return points.mean(0) + slope * (len(points) + 1) / 2
