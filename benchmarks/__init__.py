"""Time of numsru beside other layers, on whatever device is there: `python -m benchmarks --help`, README.md."""
