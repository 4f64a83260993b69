"""Convert checkpoints from and to this package, without a GPU and in the memory of one shard."""

from llava_next_ar.conversion.convert import main

if __name__ == "__main__":
    main()
