"""Run the study of the objective: the same clips and seeds for each variant, and tables.

    python scripts/study.py features                       # once: the frozen tower's features of all clips
    python scripts/study.py run --table main               # trains what is missing of a table; go on after a kill
    python scripts/study.py run --table main --seeds 0 1   # a part of it, beside another process with the other seeds
    python scripts/study.py tables                         # reads the runs; writes tables and plots beside them

One file for each arm and seed lies in `scripts/study_results/<table>/`, with all its settings, the versions of what it was
made with, every answer, and the curve over training. A file is written when its run is done, and a run whose file exists is
not repeated; a file that was made with other settings is an error.

The tables are listed in study_arms.py, the data are described in study_data.py, and what is measured in study_measures.py.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from subprocess import CalledProcessError

import torch
from tqdm import tqdm

from .arms import TABLES, Arm, RunSettings
from .data import open_data
from .runs import open_bank, read_run, run_arm, write_run
from .tables import write_tables

RESULTS = Path(__file__).parent / "results"
CACHE = Path("outputs/study")


def run_tables(
    names: Sequence[str],
    common: RunSettings,
    *,
    results: Path,
    cache: Path,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
) -> int:
    """Runs what is missing of some tables, one seed of every arm after the other; returns how many runs that were.

    Args:
        seeds, arms: only these.

    Raises:
        ValueError: for a seed or an arm that no table shows, or if a run with other settings is in its place.
    """
    unknown = set(seeds or ()) - set(range(max(TABLES[name].num_seeds for name in names)))
    if unknown:
        raise ValueError(
            f"no seed {', '.join(map(str, sorted(unknown)))} in {', '.join(names)}: nothing would show it"
        )
    wanted: list[tuple[Arm, int]] = []
    for name in names:
        for seed in range(TABLES[name].num_seeds):
            if seeds is None or seed in seeds:
                wanted += [(arm, seed) for arm in TABLES[name].arms if (arm, seed) not in wanted]
    if arms is not None:
        unknown = set(arms) - {arm.name for arm, _ in wanted}
        if unknown:
            raise ValueError(f"no arm {', '.join(sorted(unknown))} in {', '.join(names)}")
        wanted = [(arm, seed) for arm, seed in wanted if arm.name in arms]
    missing = [(arm, seed) for arm, seed in wanted if read_run(results, arm, common, seed) is None]
    if not missing:
        return 0
    data = open_data(common.data, cache)
    bank = open_bank(data, cache)
    with tqdm(missing, desc="study", unit="run") as bar:
        for arm, seed in bar:
            bar.set_postfix_str(f"{arm.table}/{arm.name}, seed {seed}")
            if read_run(results, arm, common, seed) is None:  # another process may have made it since
                write_run(results, arm, seed, run_arm(arm, common, seed, data, bank))
    return len(missing)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("what", choices=("features", "run", "tables"))
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES), help="those to run or to write")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these; by default all that a table asks for")
    parser.add_argument("--arms", nargs="+", help="only these; by default all of a table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the tower and its features")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(options.threads)
    common = RunSettings()
    try:
        if options.what == "features":
            open_bank(open_data(common.data, options.cache), options.cache)
        elif options.what == "run":
            number = run_tables(
                options.table,
                common,
                results=options.results,
                cache=options.cache,
                seeds=options.seeds,
                arms=options.arms,
            )
            print(f"{number} runs were missing, and are done")
        else:
            print(write_tables(options.table, common, options.results))
    except (ValueError, OSError, CalledProcessError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
