// Package criapi is the edge of the engine for Kubernetes: the CRI, runtime.v1,
// over gRPC. Each call is decoded, becomes one call of the engine, and its answer
// is encoded. runtime.v1alpha2 is answered by the same handlers, whose messages
// have the same encoding.
//
// Vocabulary is the CRI's: a *pod sandbox* is the engine's pod; a *handler* is a
// runtime by name. What the engine has no use for, but a client wants to be told
// again, is kept as the encoded message in the record's Edge field. Exec, attach and
// port-forward are two steps: the call returns a URL with a token that is good once,
// and a streaming server on a loopback address serves it.
//
// The network of pods is not this package's: see engine.PodNetwork, whose backends
// are network.PodBridge and a directory of CNI configuration.
//
// internal/wire imports this package.
package criapi
