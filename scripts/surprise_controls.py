"""Controls for violation of expectation: scores that learn nothing beside those of a trained head."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("experiments.controls.controls:main")
