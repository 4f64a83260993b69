"""Push a checkpoint to the Hub: model or adapter, with its processor, code and card, and nothing else."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("hub.push:main")
