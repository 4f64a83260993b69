"""Controls for violation of expectation: does a trained head separate impossible clips better than nothing learned does?

    python scripts/surprise_controls.py run                      # drawn pairs: trains what is missing, then measures
    python scripts/surprise_controls.py tables                   # raw numbers -> controls.md

Scores of a clip, all on the same pairs:

| score | learned |
|---|---|
| pixel and feature difference, raw and normalized | nothing |
| the geometric signals of GeoPhys (signals.py) on frozen features | the tower alone, elsewhere |
| all of these on a tower of random weights | nothing |
| prediction error and `model.surprise` of a head without training | the tower alone, elsewhere |
| prediction error and `model.surprise` of the study's models | all |

A score is the mean or the maximum over the frames of a clip (event-agnostic), or its value at the frame of the event (oracle).
Harmless changes (pairs.py) must not be called impossible. Intervals are 95% bootstrap intervals over pairs.
"""

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import Dinov2Model

from ...evaluation.settings import versions
from ...evaluation.tables import write_results
from ..study.arms import TABLES, RunSettings
from ..study.data import StudyData
from ..study.features import TOWER_WHEEL, encode_frames, feature_statistics, load_tower
from ..study.runs import build_model, open_bank, train_arm
from .pairs import IMPOSSIBLE, DrawnPairs, Pair, PairedClips
from .scores import PLACES, clip_values, feature_scores, model_scores, pixel_scores, untrained
from .tables import write_tables

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results"
CACHE = Path("outputs/study")
ARM = "weight-1"
CLIPS_AT_A_TIME = 60
TOLERANCE = 1e-5  # relative: batches of other clips round otherwise
FALSE_ALARMS = 0.05  # share of possible clips of the development split above the threshold

Values = dict[str, dict[str, float]]
"""By score and place one number for a clip."""


def random_tower(tower: Dinov2Model, seed: int) -> Dinov2Model:
    """A tower of the same architecture, with random weights and the same position embeddings."""
    torch.manual_seed(seed)
    drawn = Dinov2Model(tower.config).eval().requires_grad_(False)
    drawn.embeddings.position_embeddings = tower.embeddings.position_embeddings
    return drawn


def trained_models(common: RunSettings, seeds: Sequence[int], cache: Path) -> tuple[dict[str, Any], tuple]:
    """Models of the study with weight 1.0, trained unless they lie in the cache, and the statistics of their features."""
    data = StudyData(common.data)
    bank = open_bank(data, cache)
    (arm,) = [arm for arm in TABLES["main"].arms if arm.name == ARM]
    models = {}
    for seed in tqdm(seeds, desc="training", unit="model", disable=None):
        path = cache / "models" / f"{data.fingerprint}-{arm.name}-{seed}.safetensors"
        if not path.exists():
            trained = train_arm(arm, common, seed, data, bank).model
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in trained.state_dict().items()}, path)
        model = build_model(arm.settings(common), seed, len(data.vocabulary), bank)
        model.load_state_dict(load_file(path))
        models[f"seed {seed}"] = model.eval()
    if seeds:
        models["untrained"] = untrained(build_model(arm.settings(common), seeds[0], len(data.vocabulary), bank), 0).eval()
    return models, (bank.mean, bank.deviation)


class Scorer:
    """Scores of the clips of a source.

    Args:
        towers: frozen towers by name.
        statistics: mean and deviation of the features of each tower.
        models: by name; they read the features of the tower `trained`.
    """

    def __init__(
        self, clips: PairedClips, towers: dict[str, nn.Module], statistics: dict[str, tuple], models: dict[str, Any]
    ) -> None:
        self.clips, self.towers, self.statistics, self.models = clips, towers, statistics, models

    def values(self, pairs: Sequence[Pair]) -> dict[int, Values]:
        """For each clip of the pairs its `Values`, of the frame at which the event of its pair is."""
        events = {clip: pair.event_frame for pair in pairs for clip in (pair.possible, pair.changed)}
        found: dict[int, Values] = {}
        with tqdm(total=len(events), desc="scoring", unit="clip", disable=None) as bar:
            for first in range(0, len(events), CLIPS_AT_A_TIME):
                some = list(events)[first : first + CLIPS_AT_A_TIME]
                for clip, scores in zip(some, self._scores([self.clips.frames(clip) for clip in some]), strict=True):
                    found[clip] = clip_values(scores, events[clip])
                bar.update(len(some))
        return found

    def _scores(self, clips: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        results = [pixel_scores(frames) for frames in clips]
        for tower, encoder in self.towers.items():
            encoded = encode_frames(encoder, np.concatenate(clips)).unflatten(0, (len(clips), -1))  # [N, T, 1 + P, Dv]
            mean, deviation = self.statistics[tower]
            standardized = ((encoded[:, :, 1:] - mean) / deviation).numpy()
            for own, features in zip(results, standardized, strict=True):
                own |= {f"{name} | {tower} tower": values for name, values in feature_scores(features).items()}
            for name, model in self.models.items() if tower == "trained" else ():
                scored = model_scores(model, encoded, self.statistics[tower], self.clips.frame_seconds)
                for own, scores in zip(results, scored, strict=True):
                    own |= {f"{score} | {name}": values for score, values in scores.items()}
        return results


def measure(scorer: Scorer) -> dict[str, Any]:
    """The raw numbers of a source of pairs.

    Returns:
        `events`: the event of each impossible pair, `changes`: harmless ones, and `scores`: by score and place

        - `wins`: by change (`impossible`, then harmless ones) a digit for each pair: 2 the changed clip scores higher than the
          possible one, 1 as high, 0 lower;
        - `over`: by harmless change the same of the impossible clip against the harmless one of the same possible clip, where
          there is one;
        - `alarms`: of `possible` and each change a digit for each pair: 1 where the clip is above the threshold, which a
          share of `FALSE_ALARMS` of the possible clips of the development split exceeds.
    """
    development, pairs = scorer.clips.pairs["val"], scorer.clips.pairs["test"]
    known = scorer.values([pair for pair in development if pair.impossible])
    reference = [known[pair.possible] for pair in development if pair.impossible]
    values = scorer.values(pairs)
    by_change: dict[str, list[Pair]] = {IMPOSSIBLE: [pair for pair in pairs if pair.impossible]}
    for pair in pairs:
        if not pair.impossible:
            by_change.setdefault(pair.event, []).append(pair)
    impossible = {pair.possible: pair.changed for pair in by_change[IMPOSSIBLE]}
    scores: dict[str, dict[str, Any]] = {}
    for score in reference[0]:
        for place in PLACES:
            if all(np.isnan(one[score][place]) for one in reference):
                continue
            number = partial(_number, values, score, place)
            threshold = float(np.quantile([one[score][place] for one in reference], 1 - FALSE_ALARMS))
            scores.setdefault(score, {})[place] = {
                "wins": {
                    change: _digits(_compare(number(pair.changed), number(pair.possible)) for pair in some)
                    for change, some in by_change.items()
                },
                "over": {
                    change: _digits(
                        _compare(number(impossible[pair.possible]), number(pair.changed))
                        for pair in some
                        if pair.possible in impossible
                    )
                    for change, some in by_change.items()
                    if change != IMPOSSIBLE
                },
                "alarms": {
                    change: _digits(int(number(clip) > threshold * (1 + TOLERANCE)) for clip in some)
                    for change, some in {
                        "possible": list(impossible),
                        **{change: [pair.changed for pair in some] for change, some in by_change.items()},
                    }.items()
                },
            }
    return {
        "events": [pair.event for pair in by_change[IMPOSSIBLE]],
        "changes": [change for change in by_change if change != IMPOSSIBLE],
        "num_reference": len(reference),
        "scores": scores,
    }


def _number(values: dict[int, Values], score: str, place: str, clip: int) -> float:
    return values[clip][score][place]


def _compare(one: float, other: float) -> int:
    """2 if the first is higher, 1 if both are equal up to rounding or not defined, 0 if it is lower."""
    if np.isnan(one) or np.isnan(other) or abs(one - other) <= TOLERANCE * max(abs(one), abs(other)):
        return 1
    return 2 * int(one > other)


def _digits(numbers: Any) -> str:
    return "".join(map(str, numbers))


def run_drawn(common: RunSettings, seeds: Sequence[int], cache: Path) -> dict[str, Any]:
    """The raw numbers of the drawn pairs."""
    settings = common.data
    models, statistics = trained_models(common, seeds, cache)
    trained = load_tower(cache / "tower", num_layers=settings.tower_layers, image_size=settings.image_size)
    towers = {"trained": trained, "random": random_tower(trained, 0)}
    clips = DrawnPairs(settings)
    numbers = {"trained": statistics, "random": statistics_of(towers["random"], clips)}
    return {
        "source": "drawn",
        "tower": TOWER_WHEEL,
        "variant": ARM,
        "seeds": list(seeds),
        "versions": versions(),
        **measure(Scorer(clips, towers, numbers, models)),
    }


def statistics_of(tower: nn.Module, clips: PairedClips) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of a tower's features of the possible clips of the development split."""
    frames = np.concatenate([clips.frames(clip) for clip in sorted({pair.possible for pair in clips.pairs["val"]})])
    return feature_statistics(encode_frames(tower, frames).numpy())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("what", choices=("run", "tables"))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of the models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the raw numbers")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the tower, its features and the models")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(options.threads)
    try:
        if options.what == "run":
            options.results.mkdir(parents=True, exist_ok=True)
            write_results(run_drawn(RunSettings(), options.seeds, options.cache), options.results / "drawn.json")
        print(write_tables(options.results))
    except (ValueError, OSError, CalledProcessError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
