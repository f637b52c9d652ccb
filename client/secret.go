package client

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/api"
)

func spath(k api.SecretKind, rest string) string { return api.Root + "/" + string(k) + "s" + rest }

// SecretList lists secrets or configs, without values.
func (c *Client) SecretList(ctx context.Context, k api.SecretKind) ([]api.Secret, error) {
	var out []api.Secret
	err := c.read(ctx, spath(k, ""), nil, &out)
	return out, err
}

// SecretCreate stores a value under a new name.
func (c *Client) SecretCreate(ctx context.Context, k api.SecretKind, spec api.SecretSpec) (api.Secret, error) {
	var out api.Secret
	err := c.post(ctx, spath(k, ""), nil, spec, &out)
	return out, err
}

// SecretInspect tells about a secret, or about a config with its value; raw is what
// the engine sent.
func (c *Client) SecretInspect(ctx context.Context, k api.SecretKind, name string) (out api.Secret, raw json.RawMessage, err error) {
	raw, err = c.fetch(ctx, spath(k, "/"+url.PathEscape(name)), nil, &out)
	return out, raw, err
}

// SecretUpdate stores a new value, new labels, or both.
func (c *Client) SecretUpdate(ctx context.Context, k api.SecretKind, name string, spec api.SecretSpec) (api.SecretUpdated, error) {
	var out api.SecretUpdated
	err := c.post(ctx, spath(k, "/"+url.PathEscape(name)+"/update"), nil, spec, &out)
	return out, err
}

// SecretRemove removes a secret or config.
func (c *Client) SecretRemove(ctx context.Context, k api.SecretKind, name string, force bool) error {
	return c.delete(ctx, spath(k, "/"+url.PathEscape(name)), values("force", flag(force)), nil)
}

// SecretUnlock gives the passphrase that the secrets are encrypted with.
func (c *Client) SecretUnlock(ctx context.Context, passphrase string) error {
	return c.post(ctx, spath(api.KindSecret, "/unlock"), nil, api.SecretKey{Passphrase: passphrase}, nil)
}

// SecretLock makes the engine forget the keys.
func (c *Client) SecretLock(ctx context.Context) error {
	return c.post(ctx, spath(api.KindSecret, "/lock"), nil, nil, nil)
}

// SecretRekey encrypts everything anew, with a passphrase or, for "", a key file.
func (c *Client) SecretRekey(ctx context.Context, passphrase string) error {
	return c.post(ctx, spath(api.KindSecret, "/rotate-key"), nil, api.SecretKey{Passphrase: passphrase}, nil)
}

// secretLabels writes references the way Docker's create request can carry them.
func secretLabels(refs []api.SecretRef, labels map[string]string) error {
	for _, r := range refs {
		if strings.ContainsAny(r.Target+r.Name, ",;") {
			return fmt.Errorf("cannot use target %q of %s %s: it holds a comma or semicolon", r.Target, r.Kind, r.Name)
		}
		s := r.Name
		for _, f := range []struct {
			key, value string
			set        bool
		}{
			{"target", r.Target, r.Target != ""},
			{"uid", strconv.FormatUint(uint64(r.UID), 10), r.UID != 0},
			{"gid", strconv.FormatUint(uint64(r.GID), 10), r.GID != 0},
		} {
			if f.set {
				s += "," + f.key + "=" + f.value
			}
		}
		if r.Mode != nil {
			s += ",mode=" + strconv.FormatUint(uint64(*r.Mode), 8)
		}
		key := api.LabelSecrets
		if r.Kind == api.KindConfig {
			key = api.LabelConfigs
		}
		if old := labels[key]; old != "" {
			s = old + ";" + s
		}
		labels[key] = s
	}
	return nil
}
