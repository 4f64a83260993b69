"""Pictures of what a checkpoint makes of a video: what it predicted, what surprised it, where it looked, what it read."""

import sys

from llava_next_ar.pictures.visualize import main

if __name__ == "__main__":
    main(sys.argv[1:])
