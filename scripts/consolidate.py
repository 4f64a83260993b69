"""Join a checkpoint whose weights are spread over the ranks that trained it."""

from llava_next_ar.conversion.consolidate import main

if __name__ == "__main__":
    main()
