package dockerapi

import (
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/image"
)

// The engine's services and the image service are what the composition root
// puts in.
var (
	_ Containers = (*engine.Engine)(nil)
	_ Volumes    = (*engine.VolumeService)(nil)
	_ Networks   = (*engine.NetworkService)(nil)
	_ System     = (*engine.SystemService)(nil)
	_ Images     = (*image.Service)(nil)
)
