"""Merge a trained adapter into its base: a whole model, which loads without PEFT."""

from llava_next_ar.training.merge import main

if __name__ == "__main__":
    main()
