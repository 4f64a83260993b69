"""Measure speed and memory, as ratios within one run."""

from llava_next_ar.experiments.benchmarks.benchmark import main

if __name__ == "__main__":
    main()
