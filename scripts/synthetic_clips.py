"""Generate videos of moving shapes with questions whose answers are true by construction."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("experiments.temporal.synthetic_clips:main")
