"""Measure inference-time uses of the head against model-free baselines at the same budget."""

from llava_next_ar.experiments.inference.uses import main

if __name__ == "__main__":
    main()
