package criapi

import "testing"

func streams(t *testing.T, n *node)     {}
func portForward(t *testing.T, n *node) {}
