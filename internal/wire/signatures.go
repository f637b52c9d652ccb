package wire

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

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

// Active tells whether there is any rule.
func (a admitting) Active() bool { return a.rules.Active() }

// AdmitBase asks about an image that is built on. The registry's signatures are
// fetched without credentials: those of a build stay with its client.
func (a admitting) AdmitBase(ctx context.Context, who caller.Caller, ref, target, manifest string) (more bool, err error) {
	c := policy.Container{Caller: who, Image: ref, Digest: manifest}
	a.name(ctx, &c)
	err = policy.Refuse(a.rules.Base(ctx, c))
	if err == nil || manifest == "" || !a.rules.WantsSignatures() {
		return a.rules.WantsSignatures(), err
	}
	x := image.Admission{Ref: ref, Target: digest.Digest(target), Manifest: digest.Digest(manifest)}
	if why := a.verifier.Learn(ctx, x, nil); why != nil {
		return false, fault.As(fault.Of(err), fmt.Errorf("%w: %w", err, why))
	}
	return true, policy.Refuse(a.rules.Base(ctx, c))
}

// name finds what else an image is called here, if it is the one that is meant. A
// builder knows no ids: it takes them for names.
func (a admitting) name(ctx context.Context, c *policy.Container) {
	img, err := a.Resolve(ctx, c.Image, "")
	if fault.Is(err, fault.NotFound) {
		id := strings.TrimSuffix(strings.TrimPrefix(c.Image, "docker.io/library/"), ":latest")
		if img, err = a.Resolve(ctx, id, ""); err == nil && strings.HasPrefix(img.ID.Encoded(), id) {
			c.Image = id
		}
	}
	if err != nil || c.Digest != "" && c.Digest != img.Manifest.Digest.String() {
		return
	}
	c.ImageID = img.ID.String()
	if i, err := a.Inspect(ctx, c.ImageID, "", false); err == nil {
		c.Names = append(slices.Clone(i.RepoTags), i.RepoDigests...)
	}
}
