"""Measure a checkpoint on a LLaVA-JSON data set: answers to questions, and predictions of the next frame."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("evaluation.evaluate:main")
