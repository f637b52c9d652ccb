// Package signature decides for policies whether an image is signed as they want.
// It fetches what registries hold (package image), keeps it beside the engine's
// data so that a container can be made while the registry is away, and has
// servin-scan judge it: the libraries that read certificates and bundles are no part
// of the engine, and run without a network as nobody. Whatever cannot be found out is
// a refusal. The composition root gives it to package policy.
package signature

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/policy"
)

// Images is where signatures come from.
type Images interface {
	SignaturesFor(ctx context.Context, ref string, manifest digest.Digest) (api.Signatures, error)
	SignaturesOf(ctx context.Context, repos []reference.Named, digests []string, auth *registry.AuthConfig) ([]api.SignatureItem, error)
}

// Config of a Verifier.
type Config struct {
	// Program is the path of servin-scan; "" looks beside this program and then on
	// the PATH.
	Program string
	// Dir keeps what was fetched.
	Dir    string
	Images Images
	Logger *slog.Logger
}

const (
	patience   = 2 * time.Minute
	memory     = "512m"
	maxFile    = 4 << 20
	maxAnswer  = 64 << 20
	maxKept    = 4096 // images whose signatures are kept
	maxJudged  = 1024 // verdicts that are remembered
	maxRunning = 2    // verifiers at a time
)

// Verifier is a policy.Verifier. Its methods are safe for concurrent use.
type Verifier struct {
	cfg   Config
	slots chan struct{}

	mu   sync.Mutex
	good map[[sha256.Size]byte]bool // question to a yes; a no is asked again
}

// New makes a Verifier.
func New(cfg Config) *Verifier {
	return &Verifier{cfg: cfg, slots: make(chan struct{}, maxRunning), good: map[[sha256.Size]byte]bool{}}
}

var _ policy.Verifier = (*Verifier)(nil)

// Learn fetches the signatures of an image that is about to be pulled, with the
// credentials of who pulls it: they will not be at hand later.
func (v *Verifier) Learn(ctx context.Context, a image.Admission, auth *registry.AuthConfig) error {
	named, err := reference.ParseNormalizedNamed(a.Ref)
	if err != nil {
		return fault.As(fault.Invalid, err)
	}
	s := api.Signatures{Image: a.Ref, Digests: []string{a.Manifest.String()}}
	if a.Target != a.Manifest {
		s.Digests = append(s.Digests, a.Target.String())
	}
	if s.Items, err = v.cfg.Images.SignaturesOf(ctx, []reference.Named{reference.TrimNamed(named)}, s.Digests, auth); err != nil {
		return err
	}
	return v.keep(a.Manifest, s)
}

// Verify returns nil if one of the signers has signed the manifest, or the index
// that it belongs to.
func (v *Verifier) Verify(ctx context.Context, ref, manifest string, signers []policy.Signer) error {
	d, err := digest.Parse(manifest)
	if err != nil {
		return fault.New(fault.Invalid, "the image has no digest that a signature could be of: %w", err)
	}
	list, err := load(signers)
	if err != nil {
		return err
	}
	question, err := ask(d, list)
	if err != nil {
		return err
	}
	v.mu.Lock()
	known := v.good[question]
	v.mu.Unlock()
	if known {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	// What is kept first: the registry need not be there.
	kept, had := v.kept(d)
	if had {
		if err = v.judge(ctx, kept, list); err == nil {
			v.remember(question)
			return nil
		}
	}
	fresh, ferr := v.cfg.Images.SignaturesFor(ctx, ref, d)
	if ferr != nil {
		switch {
		case had:
			return err
		case fault.Is(ferr, fault.NotFound): // it is about to be pulled
			return fault.New(fault.Forbidden, "the registry has no signature of it")
		}
		return ferr
	}
	if err := v.judge(ctx, fresh, list); err != nil {
		return err
	}
	v.remember(question)
	return v.keep(d, fresh)
}

func (v *Verifier) remember(question [sha256.Size]byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.good) >= maxJudged {
		clear(v.good)
	}
	v.good[question] = true
}

// ask names a question: which manifest, and which signers with the very keys.
func ask(d digest.Digest, list []api.SignatureSigner) ([sha256.Size]byte, error) {
	b, err := json.Marshal(struct {
		Digest  digest.Digest
		Signers []api.SignatureSigner
	}{d, list})
	return sha256.Sum256(b), err
}

// load reads the files that signers name.
func load(signers []policy.Signer) ([]api.SignatureSigner, error) {
	var out []api.SignatureSigner
	for _, s := range signers {
		x := api.SignatureSigner{Identity: s.Identity, Issuer: s.Issuer}
		var err error
		if s.Key != "" {
			if x.Key, err = read(s.Key); err != nil {
				return nil, fault.New(fault.Forbidden, "cannot read the signer's key: %w", err)
			}
		}
		if s.TrustedRoot != "" {
			if x.TrustedRoot, err = read(s.TrustedRoot); err != nil {
				return nil, fault.New(fault.Forbidden, "cannot read the signer's trusted root: %w", err)
			}
		}
		out = append(out, x)
	}
	return out, nil
}

func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxFile)
	}
	return b, err
}

func (v *Verifier) program() (string, error) {
	if v.cfg.Program != "" {
		return v.cfg.Program, nil
	}
	if exe, err := os.Executable(); err == nil {
		p := filepath.Join(filepath.Dir(exe), "servin-scan")
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	p, err := exec.LookPath("servin-scan")
	if err != nil {
		return "", fault.New(fault.Unsupported, "cannot check signatures: servin-scan is neither beside servind nor on its PATH; install it there")
	}
	return p, nil
}

// judge runs servin-scan.
func (v *Verifier) judge(ctx context.Context, s api.Signatures, signers []api.SignatureSigner) error {
	prog, err := v.program()
	if err != nil {
		return err
	}
	select {
	case v.slots <- struct{}{}:
		defer func() { <-v.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	req, err := json.Marshal(api.SignatureRequest{Signatures: s, Signers: signers})
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, prog, "verify", "--memory", memory, "--timeout", patience.String())
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	cmd.Stdin = bytes.NewReader(req)
	var out, said limited
	out.left, said.left = maxAnswer, 16<<10
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return fault.New(fault.Unavailable, "cannot check signatures: %w: %s", err, strings.TrimSpace(said.String()))
	}
	var verdict api.SignatureVerdict
	if err := json.Unmarshal(out.Bytes(), &verdict); err != nil {
		return fault.New(fault.Internal, "cannot check signatures: servin-scan's answer cannot be read: %w", err)
	}
	for _, g := range verdict.Verified {
		if slices.Contains(s.Digests, g.Digest) {
			return nil
		}
	}
	if len(verdict.Problems) == 0 {
		return fault.New(fault.Forbidden, "no accepted signer has signed it")
	}
	return fault.New(fault.Forbidden, "%s", strings.Join(verdict.Problems, "; "))
}

// limited keeps the beginning of what is written.
type limited struct {
	bytes.Buffer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	n := min(len(p), l.left)
	l.left -= n
	l.Buffer.Write(p[:n])
	return len(p), nil
}

func (v *Verifier) file(d digest.Digest) string {
	return filepath.Join(v.cfg.Dir, d.Algorithm().String()+"-"+d.Encoded()+".json")
}

// kept reads what was fetched earlier. A torn or foreign file is none.
func (v *Verifier) kept(d digest.Digest) (api.Signatures, bool) {
	var s api.Signatures
	b, err := os.ReadFile(v.file(d))
	if err != nil || json.Unmarshal(b, &s) != nil || !slices.Contains(s.Digests, d.String()) {
		return s, false
	}
	return s, len(s.Items) > 0
}

// keep writes down what was fetched. It can be fetched again: what a power cut takes
// is no loss, but a file is whole or not there.
func (v *Verifier) keep(d digest.Digest, s api.Signatures) error {
	if len(s.Items) == 0 {
		return nil
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(v.cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("cannot keep signatures: %w", err)
	}
	if err := durable.WriteFile(v.file(d), b, 0o600, durable.Content); err != nil {
		return fmt.Errorf("cannot keep signatures: %w", err)
	}
	v.trim()
	return nil
}

// trim removes the oldest beyond what is kept, and what a killed engine left.
func (v *Verifier) trim() {
	ents, err := os.ReadDir(v.cfg.Dir)
	if err != nil || len(ents) <= maxKept {
		return
	}
	type file struct {
		name string
		at   time.Time
	}
	var list []file
	for _, e := range ents {
		if st, err := e.Info(); err == nil {
			list = append(list, file{e.Name(), st.ModTime()})
		}
	}
	slices.SortFunc(list, func(a, b file) int { return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.name, b.name)) })
	for _, f := range list[:max(len(list)-maxKept, 0)] {
		if err := os.Remove(filepath.Join(v.cfg.Dir, f.name)); err != nil {
			v.cfg.Logger.Warn("cannot remove kept signatures", "cause", err)
		}
	}
}
