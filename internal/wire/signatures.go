package wire

import (
	"context"
	"fmt"

	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/policy"
	"github.com/cloudos-io/cloudos/internal/signature"
)

// admitting is the images whose pulls the policy's signatures bind.
type admitting struct {
	*image.Service
	rules    *policy.Set
	verifier *signature.Verifier
}

// Pull asks once it is known what would be fetched. Nothing is asked, and nothing
// gathered, where no rule wants signatures.
func (a admitting) Pull(ctx context.Context, o image.PullOptions) error {
	if !a.rules.WantsSignatures() {
		return a.Service.Pull(ctx, o)
	}
	who, auth := caller.From(ctx), o.Auth
	o.AdmitKey = who.Edge + "\x00" + who.String()
	o.Admit = func(ctx context.Context, x image.Admission) error {
		c := policy.Container{Caller: who, Image: x.Ref, Digest: x.Manifest.String()}
		// Without signatures there is no good verdict: why there are none is told with it.
		why := a.verifier.Learn(ctx, x, auth)
		err := policy.Refuse(a.rules.Pull(ctx, c))
		if err != nil && why != nil {
			return fault.As(fault.Of(err), fmt.Errorf("%w: %w", err, why))
		}
		return err
	}
	return a.Service.Pull(ctx, o)
}
