package cli

import (
	"bufio"

	"github.com/cloudos-io/cloudos/client"
)

// Target names an engine as the flags of `servin` do; empty fields mean what they
// mean there.
type Target struct {
	// Host is an address, Context a context's name.
	Host, Context string
	// TLS are files; TLSVerify turns TLS on with what they or the environment name.
	TLS       client.TLS
	TLSVerify bool
}

// ConnectTo finds the engine that a target names.
func ConnectTo(cfg Config, t Target) (*Connection, error) {
	a := &App{Config: cfg, out: bufio.NewWriter(cfg.Stdout), host: t.Host, ctxName: t.Context, tls: t.TLS, verifyTLS: t.TLSVerify}
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	return &Connection{Client: c, app: a}, nil
}
