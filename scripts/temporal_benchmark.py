"""Generate a benchmark of temporal understanding, without any download."""

from llava_next_ar.experiments.temporal.benchmark import main

if __name__ == "__main__":
    main()
