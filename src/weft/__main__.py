"""`python -m weft …` is `weft …`."""

from weft.launch.cli import main

if __name__ == "__main__":
    main()
