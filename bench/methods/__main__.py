"""`python -m bench.methods` compares all drafting methods (`make bench-methods`)."""

from bench.methods.study import main

if __name__ == "__main__":
    main()
