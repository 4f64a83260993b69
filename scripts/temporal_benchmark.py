"""A benchmark of temporal understanding that needs no download: generated videos with true answers."""

from llava_next_ar.experiments.temporal.benchmark import main

if __name__ == "__main__":
    main()
