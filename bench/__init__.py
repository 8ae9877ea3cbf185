"""What volumes cost, measured against what peers do: ``python -m bench --help``.

Closures are generated once into a cache, in shapes of real systems, and every method publishes the same ones in the
same run.  Times are medians of warm runs unless a line says otherwise.
"""
