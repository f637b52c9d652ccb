package dockerapi

import (
	"context"
	"io"
	"net/http"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/policy"
)

// Policy shows, tests and reloads the policy in force; the composition root puts it
// together of package policy and the engine.
type Policy interface {
	Status() api.Policy
	Reload() error
	PolicyTest(ctx context.Context, req CreateRequest) ([]policy.Violation, error)
}

type policyAPI struct{ b Policy }

func (a policyAPI) show(w *response, _ *request) error {
	p := a.b.Status()
	p.Rules = nonNil(p.Rules)
	return w.json(http.StatusOK, p)
}

func (a policyAPI) reload(w *response, _ *request) error {
	if err := a.b.Reload(); err != nil {
		return err
	}
	return w.noContent()
}

// check parses a document that is not in force.
func (a policyAPI) check(w *response, r *request) error {
	b, err := io.ReadAll(http.MaxBytesReader(w.ResponseWriter, r.Body, 2<<20))
	if err != nil {
		return fault.New(fault.Invalid, "cannot read the policy: %w", err)
	}
	d, err := policy.Parse(b)
	if err != nil {
		return fault.New(fault.Invalid, "cannot use the policy: %w", err)
	}
	return w.json(http.StatusOK, api.PolicyVerdict{Allowed: true, Rules: len(d.Rules)})
}

// test asks the policy about a container that is not made.
func (a policyAPI) test(w *response, r *request) error {
	var body api.RunRequest
	if err := r.decode(w, &body); err != nil {
		return err
	}
	if body.Config == nil {
		return fault.New(fault.Invalid, "config cannot be empty in order to judge a container")
	}
	c := &created{CreateRequest: CreateRequest{Name: body.Name, Config: body.Config, HostConfig: body.HostConfig, Networking: body.Networking, Extra: body.Extra}}
	var err error
	if c.Platform, err = parsePlatform(body.Platform); err != nil {
		return err
	}
	if err := c.complete(); err != nil {
		return err
	}
	l, err := a.b.PolicyTest(r.Context(), c.CreateRequest)
	if err != nil {
		return err
	}
	v := api.PolicyVerdict{Allowed: len(l) == 0}
	for _, x := range l {
		v.Violations = append(v.Violations, x.String())
	}
	return w.json(http.StatusOK, v)
}
