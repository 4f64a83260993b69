"""Run the study of the objective: the same clips and seeds for each variant, and tables."""

from llava_next_ar.experiments.study.study import main

if __name__ == "__main__":
    main()
