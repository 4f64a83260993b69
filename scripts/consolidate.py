"""Join a checkpoint whose weights are spread over the ranks that trained it."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("conversion.consolidate:main")
