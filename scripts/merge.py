"""Merge a trained adapter into its base: a whole model, which loads without PEFT."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("training.merge:main")
