"""Generate a benchmark of temporal understanding, without any download."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("experiments.temporal.benchmark:main")
