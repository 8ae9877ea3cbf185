"""What monitoring asks: metrics by Prometheus' conventions, and whether the process lives and is ready."""
