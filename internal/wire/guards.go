package wire

import (
	"context"
	"log/slog"
	"path/filepath"

	"github.com/docker/go-units"

	"github.com/cloudos-io/cloudos/internal/audit"
	"github.com/cloudos-io/cloudos/internal/config"
	"github.com/cloudos-io/cloudos/internal/dockerapi"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/policy"
)

// guards opens the audit log and loads the policy.
func (s *System) guards(c *config.Config, signatures policy.Verifier, log *slog.Logger) (*audit.Log, *policy.Set, error) {
	rules, err := policy.Load(policy.Config{Path: c.Policy, Verifier: signatures, Logger: log})
	if err != nil {
		return nil, nil, err
	}
	s.Reload = func() error {
		if c.Policy == "" {
			return nil
		}
		return rules.Reload()
	}
	if c.Audit.Enabled != nil && !*c.Audit.Enabled {
		return nil, rules, nil
	}
	var size int64
	if c.Audit.MaxSize != "" {
		if size, err = units.RAMInBytes(c.Audit.MaxSize); err != nil || size < 1<<16 {
			return nil, nil, fault.New(fault.Invalid, "cannot use audit.maxSize %q: write it as 32m, 64k at least", c.Audit.MaxSize)
		}
	}
	calls, err := audit.Open(audit.Config{
		Dir: filepath.Join(c.Root, "audit"), Reads: c.Audit.Reads, Sync: audit.Sync(c.Audit.Sync), Required: c.Audit.Required,
		MaxSize: size, MaxFiles: c.Audit.MaxFiles, Logger: log,
	})
	if err != nil {
		return nil, nil, err
	}
	s.onClose(calls.Close)
	return calls, rules, nil
}

// policing answers the API about the policy.
type policing struct {
	*policy.Set
	e *engine.Engine
}

func (p policing) PolicyTest(ctx context.Context, req dockerapi.CreateRequest) ([]policy.Violation, error) {
	return p.e.PolicyTest(ctx, req)
}
