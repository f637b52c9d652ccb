package engine

import (
	"context"

	"github.com/cloudos-io/cloudos/internal/policy"
)

// Policy is what the engine needs of package policy: each question is answered
// with what it would break.
type Policy interface {
	Active() bool
	Create(ctx context.Context, c policy.Container) []policy.Violation
	Exec(ctx context.Context, x policy.Exec) []policy.Violation
	Mounts(c policy.Container) []policy.Violation
	Networks(c policy.Container) []policy.Violation
	Resources(c policy.Container) []policy.Violation
}
