"""`python -m bench.methods`: the comparison of all drafting methods, `make bench-methods`."""

from bench.methods.study import main

if __name__ == "__main__":
    main()
