package dockerapi

import (
	"context"
	"net/http"
	"strings"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Secrets is implemented by the engine. Docker's own routes for secrets and
// configs belong to swarm mode and answer as a Docker outside of a swarm does.
type Secrets interface {
	SecretCreate(ctx context.Context, k api.SecretKind, spec api.SecretSpec) (api.Secret, error)
	SecretList(ctx context.Context, k api.SecretKind) ([]api.Secret, error)
	SecretInspect(ctx context.Context, k api.SecretKind, ref string) (api.Secret, error)
	SecretUpdate(ctx context.Context, k api.SecretKind, ref string, spec api.SecretSpec) (api.SecretUpdated, error)
	SecretRemove(ctx context.Context, k api.SecretKind, ref string, force bool) error
	SecretUnlock(ctx context.Context, passphrase string) error
	SecretLock(ctx context.Context) error
	SecretRekey(ctx context.Context, passphrase string) error
}

// secretsAPI serves secrets or configs.
type secretsAPI struct {
	b Secrets
	k api.SecretKind
}

// spec reads a body that holds a value. Its errors show none of it.
func (a secretsAPI) spec(w *response, r *request) (api.SecretSpec, error) {
	var s api.SecretSpec
	if err := r.decode(w, &s); err != nil {
		return s, fault.New(fault.Of(err), "cannot read the %s: the body must be JSON with Name, Data (base64) and Labels, of 4 MiB at most", a.k)
	}
	return s, nil
}

func (a secretsAPI) create(w *response, r *request) error {
	s, err := a.spec(w, r)
	if err != nil {
		return err
	}
	x, err := a.b.SecretCreate(r.Context(), a.k, s)
	if err != nil {
		return err
	}
	return w.json(http.StatusCreated, x)
}

func (a secretsAPI) list(w *response, r *request) error {
	l, err := a.b.SecretList(r.Context(), a.k)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, nonNil(l))
}

func (a secretsAPI) inspect(w *response, r *request) error {
	x, err := a.b.SecretInspect(r.Context(), a.k, r.name)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, x)
}

func (a secretsAPI) update(w *response, r *request) error {
	s, err := a.spec(w, r)
	if err != nil {
		return err
	}
	x, err := a.b.SecretUpdate(r.Context(), a.k, r.name, s)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, x)
}

func (a secretsAPI) remove(w *response, r *request) error {
	if err := a.b.SecretRemove(r.Context(), a.k, r.name, r.flag("force")); err != nil {
		return err
	}
	return w.noContent()
}

// passphrase reads one; its errors show nothing of the body.
func passphrase(w *response, r *request) (string, error) {
	var k api.SecretKey
	if err := r.decode(w, &k); err != nil {
		return "", fault.New(fault.Of(err), "cannot read the passphrase: the body must be JSON")
	}
	return k.Passphrase, nil
}

func (a secretsAPI) unlock(w *response, r *request) error {
	p, err := passphrase(w, r)
	if err != nil {
		return err
	}
	if err := a.b.SecretUnlock(r.Context(), p); err != nil {
		return err
	}
	return w.noContent()
}

func (a secretsAPI) lock(w *response, r *request) error {
	if err := a.b.SecretLock(r.Context()); err != nil {
		return err
	}
	return w.noContent()
}

func (a secretsAPI) rekey(w *response, r *request) error {
	p, err := passphrase(w, r)
	if err != nil {
		return err
	}
	if err := a.b.SecretRekey(r.Context(), p); err != nil {
		return err
	}
	return w.noContent()
}

// secretLabels reads the references that Docker's clients give in labels.
func (c *created) secretLabels() error {
	for key, k := range map[string]api.SecretKind{api.LabelSecrets: api.KindSecret, api.LabelConfigs: api.KindConfig} {
		text := c.Config.Labels[key]
		if strings.Trim(text, "; ") == "" {
			continue
		}
		for s := range strings.SplitSeq(text, ";") {
			if s = strings.TrimSpace(s); s == "" {
				continue
			}
			ref, err := api.ParseSecretRef(k, s)
			if err != nil {
				return fault.New(fault.Invalid, "invalid label %s: %w", key, err)
			}
			c.Extra.Secrets = append(c.Extra.Secrets, ref)
		}
	}
	return nil
}
