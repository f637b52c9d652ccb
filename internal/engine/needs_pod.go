package engine

import (
	"context"

	"github.com/cloudos-io/cloudos/internal/network"
)

// PodNetwork gives pods their network. The engine makes and pins the namespace;
// the backend puts interfaces, addresses and port mappings into it. Backends:
// network.PodBridge, and package network/cni for a directory of CNI
// configuration. wire chooses one. Pods on the host's network never come here.
//
// Calls for one pod never overlap; those for different pods do.
type PodNetwork interface {
	// Setup connects the pod and publishes its ports. When it fails, the engine
	// calls Teardown.
	Setup(ctx context.Context, p network.Pod) (network.PodResult, error)
	// Teardown undoes Setup, whole or half done, and may be repeated: it succeeds
	// where nothing is left. p.NetNS is "" if the namespace is gone. It must end
	// in bounded time.
	Teardown(ctx context.Context, p network.Pod) error
	// Check tells whether what Setup made still stands.
	Check(ctx context.Context, p network.Pod) error
	// Status tells why pods cannot be connected now, nil if they can: the CRI's
	// condition NetworkReady.
	Status(ctx context.Context) error
	// Configure hands over the pod address range that Kubernetes allotted to this
	// node (UpdateRuntimeConfig), one or more prefixes separated by commas.
	Configure(ctx context.Context, podCIDR string) error
	// Restore is called once at the daemon's start with the pods that exist: what
	// the backend still holds for others is to be given back.
	Restore(ctx context.Context, live []network.Pod) error
	// Info describes the backend for a verbose status.
	Info() map[string]string
}
