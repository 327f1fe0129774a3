"""The command `eccl-gallery`, for a launch of several processes: accelerate starts programs by their paths."""

from eccl.search.commands import main

if __name__ == "__main__":
    main()
