"""Compare the code of a checkpoint with that of a release of this package."""

from llava_next_ar.hub.compare import main

if __name__ == "__main__":
    main()
