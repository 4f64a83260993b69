"""Push a checkpoint to the Hub: model or adapter, with its processor, code and card, and nothing else."""

from llava_next_ar.hub.push import main

if __name__ == "__main__":
    main()
