"""Train, save, reload and evaluate a tiny model in minutes, on two CPU cores and without network."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("experiments.demo.demo:main")
