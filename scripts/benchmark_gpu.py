"""One command for a GPU: parity, speed, memory, precision and every entry point, from random weights."""

from llava_next_ar.experiments.benchmarks.gpu import main

if __name__ == "__main__":
    main()
