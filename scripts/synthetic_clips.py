"""Generate videos of moving shapes with questions whose answers are true by construction."""

from llava_next_ar.experiments.temporal.synthetic_clips import main

if __name__ == "__main__":
    main()
