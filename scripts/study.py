"""Run the study of the objective: the same clips and seeds for each variant, and tables."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("experiments.study.study:main")
