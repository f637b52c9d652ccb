// Package cni pins the CNI plugins that tests build and run: a module of its own,
// so that nothing of them gets into the engine.
package cni
