"""The CSI services of a node, registration with kubelet, and the rules of the wire.  Only this room speaks gRPC."""
