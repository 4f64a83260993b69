"""Compare the code of a checkpoint with that of a release of this package."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("hub.compare:main")
