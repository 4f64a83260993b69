"""Measure a checkpoint on a LLaVA-JSON data set: answers to questions, and predictions of the next frame."""

import sys

from llava_next_ar.evaluation.evaluate import main

if __name__ == "__main__":
    main(sys.argv[1:])
