//go:build tools

// Keeps in go.mod and go.sum what is built from here, beside what the components of ../kubernetes need: upstream's
// end-to-end tests.  A module of its own, so that the components need not be built again.
package main

import (
	_ "github.com/onsi/ginkgo/v2/ginkgo"
	_ "k8s.io/kubernetes/test/e2e"
	_ "k8s.io/kubernetes/test/images/agnhost"
)
