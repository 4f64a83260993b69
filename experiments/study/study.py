"""Run the study of the objective: the same clips and seeds for each variant, and tables.

    python scripts/study.py features                            # once: the frozen tower's features of all clips
    python scripts/study.py run --experiment main               # trains missing runs; a repeated call resumes after a kill
    python scripts/study.py run --experiment main --seeds 0 1   # a part of it, beside another process with the other seeds
    python scripts/study.py ceilings                            # linear probes on the features of the simulators' clips
    python scripts/study.py clips                               # a picture of clips of each question type and event
    python scripts/study.py tables                              # reads the runs; writes tables and plots beside them

One file for each variant and seed lies in `experiments/study/results/<experiment>/`, with its settings, the versions of the
packages, each answer, and the curve over training. A file is written when its run is done, and a run whose file exists is not
repeated; a file with other settings is an error. The clips of the experiment `simulated` need the extra `sources`.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from subprocess import CalledProcessError

import torch
from tqdm import tqdm

from ...hub.command_line import CommandParser, stop
from ..sources.clips import contact_sheet, sheet_rows
from .ceilings import measure_ceilings
from .data import Settings, SimulatedSettings, StudyData, open_data
from .features import TOWER_WHEEL, FeatureBank
from .language_models import open_vocabulary
from .runs import open_bank, read_run, run_variant, write_run
from .summaries import accuracy_summary, event_summary
from .tables import CEILINGS, read_ceilings, read_experiment, write_tables
from .variants import EXPERIMENTS, RunSettings, Variant

RESULTS = Path(__file__).parent / "results"
CACHE = Path("outputs/study")
CLIPS_PICTURE = "simulated_clips.jpg"


def run_experiments(
    names: Sequence[str],
    common: RunSettings,
    *,
    results: Path,
    cache: Path,
    seeds: Sequence[int] | None = None,
    variants: Sequence[str] | None = None,
    use_cpu: bool = True,
) -> int:
    """Run what is missing of some experiments, one seed of each variant after the other.

    Args:
        seeds, variants: only these.
        use_cpu: False trains on the accelerator.

    Returns:
        the number of runs.

    Raises:
        ValueError: for a seed or a variant that no experiment shows, or if a run with other settings is in its place.
    """
    unknown = set(seeds or ()) - set(range(max(EXPERIMENTS[name].num_seeds for name in names)))
    if unknown:
        raise ValueError(
            f"seeds {', '.join(map(str, sorted(unknown)))} belong to no experiment of {', '.join(names)}: no table would "
            "show them"
        )
    wanted: list[tuple[Variant, int]] = []
    for name in names:
        for seed in range(EXPERIMENTS[name].num_seeds):
            if seeds is None or seed in seeds:
                wanted += [(variant, seed) for variant in EXPERIMENTS[name].variants if (variant, seed) not in wanted]
    if variants is not None:
        unknown = set(variants) - {variant.name for variant, _ in wanted}
        if unknown:
            raise ValueError(f"variants {', '.join(sorted(unknown))} belong to no experiment of {', '.join(names)}")
        wanted = [(variant, seed) for variant, seed in wanted if variant.name in variants]
    missing = [(variant, seed) for variant, seed in wanted if read_run(results, variant, common, seed) is None]
    opened: dict[tuple[Settings, str], tuple[StudyData, FeatureBank]] = {}
    with tqdm(missing, desc="study", unit="run") as bar:
        for variant, seed in bar:
            bar.set_postfix_str(f"{variant.experiment}/{variant.name}, seed {seed}")
            settings = variant.settings(common)
            key = settings.data, settings.language_model
            if key not in opened:
                vocabulary = open_vocabulary(cache) if settings.language_model else None
                data = open_data(settings.data, cache, vocabulary)
                opened[key] = data, open_bank(data, cache)
            if read_run(results, variant, common, seed) is None:  # another process may have made it since
                run = run_variant(variant, common, seed, *opened[key], cache=cache, use_cpu=use_cpu)
                write_run(results, variant, seed, run)
    return len(missing)


def write_ceilings(settings: Settings, *, results: Path, cache: Path) -> Path:
    """Measure the linear ceilings of the clips and write them beside the runs."""
    data = open_data(settings, cache)
    entries = list(tqdm(measure_ceilings(data, open_bank(data, cache)), desc="ceilings", unit="question type"))
    content = {"data": json.loads(json.dumps(asdict(settings))), "tower": TOWER_WHEEL, "question_types": entries}
    path = results / CEILINGS
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def write_summaries(names: Sequence[str], common: RunSettings, results: Path) -> None:
    """Write `<experiment>_summary.md` for each experiment on recorded clips that has runs."""
    ceilings = read_ceilings(results)
    for name in names:
        experiment = EXPERIMENTS[name]
        runs = read_experiment(experiment, common, results)
        if not runs or not isinstance(experiment.variants[0].settings(common).data, SimulatedSettings):
            continue
        parts = [accuracy_summary(experiment, runs, ceilings), event_summary(experiment, runs)]
        (results / f"{name}_summary.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("what", choices=("features", "run", "ceilings", "clips", "tables"))
    parser.add_argument(
        "--experiment",
        nargs="+",
        choices=EXPERIMENTS,
        default=list(EXPERIMENTS),
        help="experiments to run or to write",
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="only these; by default all of an experiment")
    parser.add_argument("--variants", nargs="+", help="only these; by default all of an experiment")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the tower and its features")
    parser.add_argument("--device", choices=("cpu", "accelerator"), default="cpu", help="device of the training")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(options.threads)
    common = RunSettings()
    try:
        if options.device == "accelerator" and not torch.accelerator.is_available():
            raise ValueError("--device is accelerator, and PyTorch finds none here: expected a GPU, or --device cpu")
        if options.what == "features":
            for settings in {
                v.settings(common).data for name in options.experiment for v in EXPERIMENTS[name].variants
            }:
                open_bank(open_data(settings, options.cache), options.cache)
        elif options.what == "ceilings":
            print(write_ceilings(SimulatedSettings(), results=options.results, cache=options.cache))
        elif options.what == "clips":
            library = open_data(SimulatedSettings(), options.cache).library
            contact_sheet(library, sheet_rows(library)).save(options.results / CLIPS_PICTURE, quality=85)
        elif options.what == "run":
            number = run_experiments(
                options.experiment,
                common,
                results=options.results,
                cache=options.cache,
                seeds=options.seeds,
                variants=options.variants,
                use_cpu=options.device == "cpu",
            )
            print(f"{number} runs were missing, and are done")
        else:
            print(write_tables(options.experiment, common, options.results))
            write_summaries(options.experiment, common, options.results)
    except (ValueError, OSError, ImportError, CalledProcessError) as error:
        stop(error)


if __name__ == "__main__":
    main()
