"""Controls for violation of expectation: scores that learn nothing beside those of a trained head."""

from llava_next_ar.experiments.controls.controls import main

if __name__ == "__main__":
    main()
