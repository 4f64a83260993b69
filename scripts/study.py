"""The study of what the objective does for understanding: the same clips and seeds for every arm, in tables."""

from llava_next_ar.experiments.study.study import main

if __name__ == "__main__":
    main()
