"""`python -m bench`: the same as `outrider bench`."""

import sys

from actors.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench"]
    main()
