"""Write a complete Hub folder with a tiny model: random weights, real code paths."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("experiments.demo.tiny_checkpoint:main")
