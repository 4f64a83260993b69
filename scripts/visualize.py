"""Draw a checkpoint's predictions, surprise, attention and tokens for a video."""

import sys

from llava_next_ar.pictures.visualize import main

if __name__ == "__main__":
    main(sys.argv[1:])
