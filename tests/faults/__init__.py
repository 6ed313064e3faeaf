"""Generated faults: cases.py makes them, bench.py runs each one in a process of its own."""
