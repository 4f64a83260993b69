"""What the head buys at inference, against the obvious cheap way at the same budget."""

from llava_next_ar.experiments.inference.uses import main

if __name__ == "__main__":
    main()
