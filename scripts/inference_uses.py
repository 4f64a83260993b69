"""Measure inference-time uses of the head against model-free baselines at the same budget."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("experiments.inference.uses:main")
