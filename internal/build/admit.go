package build

import (
	"context"
	"crypto/rand"
	"sync"

	"github.com/cloudos-io/cloudos/internal/build/contract"
	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// callers are who asked for what the builder works at, by names that it can hand
// back and nobody can guess.
type callers struct {
	mu sync.Mutex
	m  map[string]caller.Caller
}

// add names a caller until forget is called.
func (c *callers) add(who caller.Caller) (token string, forget func()) {
	token = rand.Text()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		c.m = map[string]caller.Caller{}
	}
	c.m[token] = who
	return token, func() {
		c.mu.Lock()
		delete(c.m, token)
		c.mu.Unlock()
	}
}

func (c *callers) get(token string) (caller.Caller, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	who, ok := c.m[token]
	return who, ok
}

// Admit asks the rules about an image that a build is to use, for each of those that
// it is built for. Where nobody is known the image is refused: rules may depend on it.
func (s *services) Admit(ctx context.Context, r contract.AdmitRequest) (contract.AdmitResponse, error) {
	var a contract.AdmitResponse
	if s.cfg.Rules == nil || !s.cfg.Rules.Active() {
		return a, nil
	}
	known := false
	for _, token := range r.Callers {
		who, ok := s.callers.get(token)
		if !ok {
			continue
		}
		known = true
		more, err := s.cfg.Rules.AdmitBase(ctx, who, r.Ref, r.Target, r.Manifest)
		if err != nil {
			return a, err
		}
		a.More = a.More || more
	}
	if !known {
		return a, fault.New(fault.Forbidden, "cannot use image %s: there is a policy, and the build has no session that tells who builds", r.Ref)
	}
	return a, nil
}
