"""Fine-tune a video language model with next-frame reconstruction."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("training.run:main")
