"""Convert checkpoints from and to this package, without a GPU and in the memory of one shard."""

from llava_next_ar.scripts.command import run

if __name__ == "__main__":
    run("conversion.convert:main")
