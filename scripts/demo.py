"""Train, save, reload and evaluate a tiny model in minutes, on two CPU cores and without network."""

from llava_next_ar.experiments.demo.demo import main

if __name__ == "__main__":
    main()
