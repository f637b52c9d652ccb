// Package policy says what may run. A *policy* is a versioned YAML document of
// *rules*; each rule has conditions (when) and *constraints* (images, users,
// capabilities, …). Every rule whose conditions hold for a request must be kept
// whole; a constraint that a rule does not name constrains nothing. So rules only
// ever take away, and their order does not matter. Without a document everything
// is allowed.
//
// Deciding is pure but for signatures, which a Verifier checks. What a privileged
// container gets counts as asked for: all capabilities, all devices, nothing
// confined. The engine asks before it creates a container or a volume, executes a
// command, connects a network or changes limits, and for signatures before it pulls;
// the edges show and test policies.
package policy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/moby/moby/api/types/container"
	"go.yaml.in/yaml/v3"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Version of the document.
const Version = 1

const (
	maxDocument = 1 << 20
	maxRules    = 1000
)

// Document is a policy.
type Document struct {
	Version int    `yaml:"version"`
	Rules   []Rule `yaml:"rules"`
}

// Mount is a mount of a container that somebody asks for.
type Mount struct {
	// Type is bind, volume, tmpfs or image. A volume of the local driver that is
	// itself a bind is a bind.
	Type, Source, Target string
	ReadOnly             bool
	// Volume is set for a bind that a volume makes.
	Volume string
	// Device is what a volume mounts that is neither ours nor a bind: nfs, a disk.
	Device string
}

// Container is what a request to create one comes to, the image's defaults
// included.
type Container struct {
	Caller caller.Caller
	// Image is the reference as asked for; Names are all names that the image has
	// here; Digest is that of its manifest.
	Image, ImageID, Digest string
	Names                  []string
	Config                 *container.Config
	HostConfig             *container.HostConfig
	Mounts                 []Mount
	Networks               []string
}

// Exec is a command that is to be executed in a container.
type Exec struct {
	Container
	User       string
	Privileged bool
}

// Verifier checks who signed an image.
type Verifier interface {
	// Verify returns nil if one of the signers has signed the manifest.
	Verify(ctx context.Context, image, digest string, signers []Signer) error
}

// Violation is a rule that a request breaks.
type Violation struct {
	Rule, What, Fix string
}

func (v Violation) String() string {
	s := fmt.Sprintf("policy rule %q refuses %s", v.Rule, v.What)
	if v.Fix != "" {
		s += ": " + v.Fix
	}
	return s
}

// Parse reads and checks a document. Unknown keys are errors.
func Parse(b []byte) (*Document, error) {
	if len(b) > maxDocument {
		return nil, fault.New(fault.Invalid, "the policy is larger than %d bytes", maxDocument)
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	dec.KnownFields(true)
	d := new(Document)
	if err := dec.Decode(d); err != nil && !errors.Is(err, io.EOF) {
		return nil, fault.As(fault.Invalid, err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, fault.New(fault.Invalid, "there must be one document only")
	}
	if d.Version != Version {
		return nil, fault.New(fault.Invalid, "version is %d; this engine reads version %d (the first line must be \"version: %d\")", d.Version, Version, Version)
	}
	if len(d.Rules) > maxRules {
		return nil, fault.New(fault.Invalid, "there are more than %d rules", maxRules)
	}
	seen := map[string]bool{}
	for i := range d.Rules {
		r := &d.Rules[i]
		if r.Name == "" {
			return nil, fault.New(fault.Invalid, "rule %d has no name", i+1)
		}
		if seen[r.Name] {
			return nil, fault.New(fault.Invalid, "two rules are named %q", r.Name)
		}
		seen[r.Name] = true
		if err := r.compile(); err != nil {
			return nil, fault.New(fault.Invalid, "rule %q: %w", r.Name, err)
		}
	}
	return d, nil
}

// Config of a Set.
type Config struct {
	// Path of the document, "" for none.
	Path     string
	Verifier Verifier
	Logger   *slog.Logger
}

// Set is the policy in force. Its methods are safe for concurrent use and for nil.
type Set struct {
	c     Config
	log   *slog.Logger
	state atomic.Pointer[state]
}

type state struct {
	doc    *Document
	text   string
	loaded time.Time
	failed string // why the latest attempt to load did not take
}

// Load reads the policy. A broken one is an error.
func Load(c Config) (*Set, error) {
	s := &Set{c: c, log: c.Logger}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if c.Path == "" {
		s.state.Store(&state{doc: &Document{Version: Version}})
		return s, nil
	}
	st, err := read(c.Path)
	if err != nil {
		return nil, err
	}
	s.state.Store(st)
	return s, nil
}

func read(path string) (*state, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the policy: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err == nil && st.Mode().Perm()&0o002 != 0 {
		return nil, fault.New(fault.Invalid, "cannot use the policy %s: everybody may write to it; chmod o-w %s", path, path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the policy: %w", err)
	}
	d, err := Parse(b)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot use the policy %s: %w", path, err)
	}
	return &state{doc: d, text: string(b), loaded: time.Now().UTC()}, nil
}

// Reload reads the document again. If it is broken the one in force stays.
func (s *Set) Reload() error {
	if s == nil || s.c.Path == "" {
		return fault.New(fault.Conflict, "this engine has no policy: name one with 'policy: /path' in its configuration")
	}
	st, err := read(s.c.Path)
	if err != nil {
		n := *s.state.Load()
		n.failed = err.Error()
		s.state.Store(&n)
		s.log.Error("the policy was not loaded again; the one before stays in force", "cause", err)
		return fault.New(fault.Invalid, "%w; the policy loaded at %s stays in force", err, n.loaded.Format(time.RFC3339))
	}
	s.state.Store(st)
	s.log.Info("policy loaded", "path", s.c.Path, "rules", len(st.doc.Rules))
	return nil
}

// Status shows the policy in force.
func (s *Set) Status() api.Policy {
	if s == nil {
		return api.Policy{}
	}
	st := s.state.Load()
	out := api.Policy{Path: s.c.Path, Loaded: st.loaded, Document: st.text, Problem: st.failed}
	for _, r := range st.doc.Rules {
		out.Rules = append(out.Rules, r.Name)
	}
	return out
}

// Active tells whether there is any rule.
func (s *Set) Active() bool { return s != nil && len(s.state.Load().doc.Rules) > 0 }

// Create says what a container would break.
func (s *Set) Create(ctx context.Context, c Container) []Violation {
	if !s.Active() {
		return nil
	}
	return s.state.Load().doc.create(ctx, c, s.c.Verifier)
}

// WantsSignatures tells whether any rule asks for signatures.
func (s *Set) WantsSignatures() bool {
	return s.Active() && slices.ContainsFunc(s.state.Load().doc.Rules, func(r Rule) bool { return r.Images != nil && len(r.Images.SignedBy) > 0 })
}

// Pull says what fetching an image would break: of all constraints those of
// signatures alone, since the others are about what becomes of it.
func (s *Set) Pull(ctx context.Context, c Container) []Violation {
	if !s.Active() {
		return nil
	}
	return s.state.Load().doc.each(c, func(r *Rule, b *breach) { r.Images.signed(ctx, c, s.c.Verifier, b) })
}

// Base says what building on an image would break: all that rules say of images.
// Before its digest is known signatures are not asked for.
func (s *Set) Base(ctx context.Context, c Container) []Violation {
	if !s.Active() {
		return nil
	}
	return s.state.Load().doc.each(c, func(r *Rule, b *breach) {
		r.Images.named(c, b)
		if c.Digest != "" {
			r.Images.signed(ctx, c, s.c.Verifier, b)
		}
	})
}

// Exec says what a command would break.
func (s *Set) Exec(_ context.Context, x Exec) []Violation {
	if !s.Active() {
		return nil
	}
	return s.state.Load().doc.exec(x)
}

// Mounts says what mounts would break: of a volume that is made, or of a container
// that starts, whose sources may have become links meanwhile.
func (s *Set) Mounts(c Container) []Violation {
	if !s.Active() {
		return nil
	}
	return s.state.Load().doc.each(c, func(r *Rule, b *breach) { r.Mounts.check(c.Mounts, b) })
}

// Networks says what connecting to networks would break.
func (s *Set) Networks(c Container) []Violation {
	if !s.Active() {
		return nil
	}
	return s.state.Load().doc.each(c, func(r *Rule, b *breach) { r.Networks.check(c.Networks, b) })
}

// Resources says what new limits would break.
func (s *Set) Resources(c Container) []Violation {
	if !s.Active() {
		return nil
	}
	return s.state.Load().doc.each(c, func(r *Rule, b *breach) { r.Resources.check(&c.HostConfig.Resources, b) })
}

// Refuse makes an error of violations, nil of none.
func Refuse(vs []Violation) error {
	if len(vs) == 0 {
		return nil
	}
	var l []string
	for _, v := range vs {
		l = append(l, v.String())
	}
	return fault.New(fault.Forbidden, "%s", strings.Join(l, "; "))
}
