package wire

import (
	"log/slog"

	"github.com/cloudos-io/cloudos/internal/config"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// commandDriver drives an OCI runtime through its command line.
func commandDriver(*config.Config, string, config.Runtime, *slog.Logger) (runtime.Driver, error) {
	return nil, nil
}
