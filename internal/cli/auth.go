package cli

import (
	"context"

	"github.com/moby/moby/api/types/registry"

	"github.com/cloudos-io/cloudos/internal/cli/config"
)

// auth finds the credentials for an image's registry, nil for none.
func (a *App) auth(ctx context.Context, image string) (*registry.AuthConfig, error) {
	f, err := a.file()
	if err != nil {
		return nil, err
	}
	return config.Credentials(f, a.Getenv).Get(ctx, config.RegistryOf(image))
}
