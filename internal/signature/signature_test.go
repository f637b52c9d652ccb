package signature

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/policy"
)

// registryOf answers with what it is given.
type registryOf struct {
	items []api.SignatureItem
	err   error
	asked int
}

func (r *registryOf) SignaturesFor(_ context.Context, ref string, d digest.Digest) (api.Signatures, error) {
	r.asked++
	return api.Signatures{Image: ref, Digests: []string{d.String()}, Items: r.items}, r.err
}

func (r *registryOf) SignaturesOf(context.Context, []reference.Named, []string, *registry.AuthConfig) ([]api.SignatureItem, error) {
	r.asked++
	return r.items, r.err
}

func keyFile(t *testing.T) string {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "k.pub")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// script is a program in servin-scan's place that answers as it is told: what the
// engine makes of wrong answers cannot be tested with the real one.
func script(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "scan")
	if err := os.WriteFile(file, []byte("#!/bin/sh\ncat >/dev/null\n"+text+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestFailsClosed goes through what can be missing or wrong: all of it refuses.
func TestFailsClosed(t *testing.T) {
	d := digest.FromString("image")
	some := []api.SignatureItem{{Found: "t", MediaType: "m", Data: []byte("{}")}}
	key := keyFile(t)
	good := `echo '{"verified":[{"digest":"` + d.String() + `","found":"t"}]}'`
	for _, c := range []struct {
		name, program, key, digest string
		from                       *registryOf
		want                       string // "" is verified
	}{
		{"good", script(t, good), key, d.String(), &registryOf{items: some}, ""},
		{"no program", "/nonexistent/servin-scan", key, d.String(), &registryOf{items: some}, "cannot check signatures"},
		{"the program fails", script(t, "echo why >&2; "+good+"; exit 1"), key, d.String(), &registryOf{items: some}, "why"},
		{"no answer", script(t, ""), key, d.String(), &registryOf{items: some}, "cannot be read"},
		{"an empty answer", script(t, "echo {}"), key, d.String(), &registryOf{items: some}, "no accepted signer"},
		{"an answer about another image", script(t, strings.Replace(good, d.String(), digest.FromString("other").String(), 1)), key, d.String(), &registryOf{items: some}, "no accepted signer"},
		{"its reasons", script(t, `echo '{"problems":["it is forged"]}'`), key, d.String(), &registryOf{items: some}, "it is forged"},
		{"no registry", script(t, good), key, d.String(), &registryOf{err: errors.New("away")}, "away"},
		{"no key", script(t, good), "/nonexistent.pub", d.String(), &registryOf{items: some}, "cannot read the signer's key"},
		{"no digest", script(t, good), key, "", &registryOf{items: some}, "no digest"},
	} {
		v := New(Config{Program: c.program, Dir: filepath.Join(t.TempDir(), "kept"), Images: c.from, Logger: slog.New(slog.DiscardHandler)})
		err := v.Verify(t.Context(), "ref", c.digest, []policy.Signer{{Key: c.key}})
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// TestKept is about what is remembered, and about whom.
func TestKept(t *testing.T) {
	d := digest.FromString("image")
	dir := filepath.Join(t.TempDir(), "kept")
	reg := &registryOf{items: []api.SignatureItem{{Found: "t", MediaType: "m", Data: []byte("{}")}}}
	prog := script(t, `echo '{"verified":[{"digest":"`+d.String()+`"}]}'`)
	open := func() *Verifier {
		return New(Config{Program: prog, Dir: dir, Images: reg, Logger: slog.New(slog.DiscardHandler)})
	}
	v := open()
	if err := v.Learn(t.Context(), image.Admission{Ref: "reg.example/a:1", Target: d, Manifest: d}, nil); err != nil {
		t.Fatal(err)
	}
	reg.err, reg.items = fault.New(fault.Unavailable, "away"), nil
	key := keyFile(t)
	for range 2 {
		v = open() // a new engine knows what was kept
		if err := v.Verify(t.Context(), "a", d.String(), []policy.Signer{{Key: key}}); err != nil {
			t.Error(err)
		}
	}
	if reg.asked != 1 {
		t.Errorf("the registry was asked %d times", reg.asked)
	}
	// A good verdict is about these keys and this image alone.
	if err := os.WriteFile(prog, []byte("#!/bin/sh\ncat >/dev/null\necho '{}'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := v.Verify(t.Context(), "a", d.String(), []policy.Signer{{Key: key}}); err != nil {
		t.Errorf("a verdict was forgotten: %v", err)
	}
	if err := v.Verify(t.Context(), "a", d.String(), []policy.Signer{{Key: keyFile(t)}}); err == nil {
		t.Error("the verdict for one key stands for another")
	}
	if err := v.Verify(t.Context(), "b", digest.FromString("b").String(), []policy.Signer{{Key: key}}); err == nil {
		t.Error("the verdict for one image stands for another")
	}
	// A torn file, or one of another image, is none.
	for _, text := range []string{"{", `{"digests":["` + digest.FromString("b").String() + `"],"items":[{"found":"x"}]}`} {
		if err := os.WriteFile(v.file(d), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, ok := v.kept(d); ok {
			t.Errorf("%s is believed", text)
		}
	}
}
