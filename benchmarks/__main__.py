"""python -m benchmarks GRID...  and  python -m benchmarks accuracy."""

import sys

from benchmarks import accuracy

if __name__ == "__main__":
    if sys.argv[1:2] == ["accuracy"]:
        accuracy.main(sys.argv[2:])
