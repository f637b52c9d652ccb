package cli

import (
	"bufio"
	"context"

	"github.com/moby/moby/api/types/registry"

	"github.com/cloudos-io/cloudos/client"
)

// Connection is the engine that a command line means, for programs beside it.
type Connection struct {
	Client *client.Client
	app    *App
}

// Connect finds the engine as `servin` would: from the environment, the context in
// use, or the default.
func Connect(cfg Config) (*Connection, error) {
	a := &App{Config: cfg, out: bufio.NewWriter(cfg.Stdout)}
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	return &Connection{Client: c, app: a}, nil
}

// Auth finds the credentials for an image's registry, nil for none.
func (c *Connection) Auth(ctx context.Context, image string) (*registry.AuthConfig, error) {
	return c.app.auth(ctx, image)
}

// Explain says what to do about an error where that is known.
func Explain(err error) string { return (&App{}).explain(err) }
