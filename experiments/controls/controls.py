"""Controls for violation of expectation: does a trained head separate impossible clips better than nothing learned does?

    python scripts/surprise_controls.py run --source drawn        # trains the models that are missing, then measures
    python scripts/surprise_controls.py run --source vizdoom      # recorded pairs, without a model
    python scripts/surprise_controls.py run --source metaworld
    python scripts/surprise_controls.py run --source motions
    python scripts/surprise_controls.py tables                    # raw numbers -> controls.md

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
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import Dinov2Model

from ...evaluation.settings import versions
from ...evaluation.tables import write_results
from ...hub.command_line import CommandParser, stop
from ..sources.clips import ClipLibrary, ClipPair, open_library
from ..study.data import SimulatedSettings, open_data
from ..study.features import TOWER_WHEEL, encode_frames, feature_statistics, load_tower
from ..study.runs import build_model, open_bank, run_variant
from ..study.variants import EXPERIMENTS, RunSettings
from .pairs import IMPOSSIBLE, LIGHT_CHANGES, with_harmless_pairs
from .scores import PLACES, clip_values, feature_scores, model_scores, pixel_scores, untrained
from .tables import write_tables

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results"
CACHE = Path("outputs/study")
VARIANT = "weight-1"
SOURCES = ("drawn", "vizdoom", "metaworld", "motions")
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


def trained_models(
    data: Any, bank: nn.Module, common: RunSettings, seeds: Sequence[int], cache: Path
) -> dict[str, Any]:
    """Models of the study with weight 1.0, trained unless they lie in the cache, and one without training."""
    (variant,) = [variant for variant in EXPERIMENTS["main"].variants if variant.name == VARIANT]
    settings, models = variant.settings(common), {}
    for seed in tqdm(seeds, desc="training", unit="model", disable=None):
        path = cache / "models" / f"{data.fingerprint}-{variant.name}-{seed}.safetensors"
        if not path.exists():
            run_variant(variant, common, seed, data, bank, weights=path)
        model = build_model(settings, seed, data.vocabulary, bank)
        model.load_state_dict(load_file(path))
        models[f"seed {seed}"] = model.eval()
    models["untrained"] = untrained(build_model(settings, 0, data.vocabulary, bank), 0).eval()
    return models


class Scorer:
    """Scores of the clips of a source.

    Args:
        towers: frozen towers by name.
        statistics: mean and deviation of the features of each tower.
        models: by name; they read the features of the tower `trained`.
    """

    def __init__(
        self, clips: ClipLibrary, towers: dict[str, nn.Module], statistics: dict[str, tuple], models: dict[str, Any]
    ) -> None:
        self.clips, self.towers, self.statistics, self.models = clips, towers, statistics, models

    def values(self, pairs: Sequence[ClipPair]) -> dict[int, Values]:
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
    by_change: dict[str, list[ClipPair]] = {IMPOSSIBLE: [pair for pair in pairs if pair.impossible]}
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


def run_source(source: str, common: RunSettings, seeds: Sequence[int], cache: Path) -> dict[str, Any]:
    """The raw numbers of a source of pairs: with models for the drawn clips, and without for those of a simulator."""
    settings = common.data if source == "drawn" else SimulatedSettings()
    tower = load_tower(cache / "tower", num_layers=settings.tower_layers, image_size=settings.image_size)
    towers, models, statistics = {"trained": tower, "random": random_tower(tower, 0)}, {}, {}
    if source == "drawn":
        data = open_data(settings, cache)
        bank = open_bank(data, cache)
        models, statistics["trained"] = trained_models(data, bank, common, seeds, cache), (bank.mean, bank.deviation)
        library = with_harmless_pairs(data.library)
    else:
        library = open_library(getattr(settings, source), cache / "sources")
        if all(pair.impossible for pair in library.pairs["test"]):
            library = with_harmless_pairs(library, LIGHT_CHANGES)
    for name, own in towers.items():
        statistics.setdefault(name, statistics_of(own, library))
    return {
        "source": source,
        "tower": TOWER_WHEEL,
        "variant": VARIANT,
        "seeds": list(seeds) if models else [],
        "versions": versions(),
        **measure(Scorer(library, towers, statistics, models)),
    }


def statistics_of(tower: nn.Module, clips: ClipLibrary) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of a tower's features of the possible clips of the development split."""
    frames = np.concatenate([clips.frames(clip) for clip in sorted({pair.possible for pair in clips.pairs["val"]})])
    return feature_statistics(encode_frames(tower, frames).numpy())


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("what", choices=("run", "tables"))
    parser.add_argument("--source", choices=SOURCES, default="drawn")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4], help="of the models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the raw numbers")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the tower, its features and the models")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(options.threads)
    try:
        if options.what == "run":
            options.results.mkdir(parents=True, exist_ok=True)
            numbers = run_source(options.source, RunSettings(), options.seeds, options.cache)
            write_results(numbers, options.results / f"{options.source}.json")
        print(write_tables(options.results))
    except (ValueError, OSError, CalledProcessError) as error:
        stop(error)


if __name__ == "__main__":
    main()
