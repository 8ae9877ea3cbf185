"""Tests against a real etcd and a real kube-apiserver, with RBAC."""
