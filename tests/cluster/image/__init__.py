"""Container images for the test cluster, made here from Debian packages and this tree: see `recipe`."""
