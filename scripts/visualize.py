"""Draw a checkpoint's predictions, surprise, attention and tokens for a video."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("pictures.visualize:main")
