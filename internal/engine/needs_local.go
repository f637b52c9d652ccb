package engine

import (
	"context"

	"github.com/cloudos-io/cloudos/internal/snapshot"
)

// IDMaps hands out ranges of host ids to containers with a user namespace of
// their own.
type IDMaps interface {
	Allocate(ctx context.Context, containerID string, ephemeral bool) (snapshot.IDMap, error)
	Release(containerID string) error
	// Retain releases the ranges of all containers but those that exist.
	Retain(exists func(containerID string) bool) error
}
