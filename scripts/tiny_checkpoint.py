"""Write a complete Hub folder with a tiny model: random weights, real code paths."""

from llava_next_ar.experiments.demo.tiny_checkpoint import main

if __name__ == "__main__":
    main()
