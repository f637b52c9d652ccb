// Package cri runs a stock kubelet of Kubernetes v1.36.3, built from its module
// as it is, stand-alone against the engine's CRI socket. It is a module of its
// own, so that nothing of Kubernetes gets into the engine's requirements.
package cri
