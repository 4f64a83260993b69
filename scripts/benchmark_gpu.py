"""One command for a GPU: parity, speed, memory, precision and every entry point, from random weights."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("experiments.benchmarks.gpu:main")
