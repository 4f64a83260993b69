"""Measure speed and memory, as ratios within one run."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("experiments.benchmarks.benchmark:main")
