"""The wire contracts: ``.proto`` files, and the Python that ``python -m cknix_csi.proto.generate`` makes of them."""
