"""Fine-tune a video language model with next-frame reconstruction."""

import sys

from llava_next_ar.training.run import main

if __name__ == "__main__":
    main(sys.argv[1:])
