package alert

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Rules is the document that says what to watch and whom to tell.
type Rules struct {
	// Version must be 1.
	Version int `yaml:"version"`
	// Interval between two looks (default 10s, at least 1s).
	Interval Duration          `yaml:"interval"`
	Rules    []*Rule           `yaml:"rules"`
	Actions  map[string]Action `yaml:"actions"`
}

// Rule is one thing to watch.
type Rule struct {
	Name string `yaml:"name"`
	// When is the condition, see ParseExpr.
	When string `yaml:"when"`
	// For is how long it must hold (default: not at all).
	For Duration `yaml:"for"`
	// Repeat tells again while it holds (default: once only).
	Repeat Duration `yaml:"repeat"`
	// Match picks containers; empty picks all.
	Match Match `yaml:"match"`
	// Actions to take, by name.
	Actions []string `yaml:"actions"`
	// Message is passed on.
	Message string `yaml:"message"`

	expr *Expr
}

// Match picks containers by patterns (* and ?) and labels.
type Match struct {
	Name   string            `yaml:"name"`
	Image  string            `yaml:"image"`
	Labels map[string]string `yaml:"labels"`
}

func (m Match) picks(c *Container) bool {
	glob := func(p, s string) bool {
		if p == "" {
			return true
		}
		ok, err := path.Match(p, s)
		return err == nil && ok
	}
	if !glob(m.Name, c.Name) || m.Image != "" && !glob(m.Image, c.Image) && m.Image != c.Image {
		return false
	}
	for k, v := range m.Labels {
		if have, ok := c.Labels[k]; !ok || v != "" && have != v {
			return false
		}
	}
	return true
}

// Action is what is done when a rule fires and when it is over.
type Action struct {
	// Webhook is a URL that gets a POST of a JSON Notice.
	Webhook string            `yaml:"webhook"`
	Headers map[string]string `yaml:"headers"`
	// Command is executed, never by a shell, with a Notice on standard input.
	Command []string `yaml:"command"`
	// User runs the command: one that is not root (default nobody).
	User string `yaml:"user"`
	// Timeout of an attempt (default 10s, at most 5m).
	Timeout Duration `yaml:"timeout"`
	// PerMinute bounds how often (default 10).
	PerMinute int `yaml:"perMinute"`

	uid, gid uint32
}

// Duration is written as 1m30s.
type Duration time.Duration

// UnmarshalYAML reads a duration with a unit.
func (d *Duration) UnmarshalYAML(n *yaml.Node) error {
	v, err := time.ParseDuration(n.Value)
	if err != nil || v < 0 {
		return fmt.Errorf("line %d: %q is no duration (write it as 15s or 1m30s)", n.Line, n.Value)
	}
	*d = Duration(v)
	return nil
}

const maxDocument = 1 << 20

// Load reads and checks a file.
func Load(file string) (*Rules, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fault.New(fault.NotFound, "cannot read the alert rules: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("cannot read the alert rules: %w", err)
	}
	r, err := Parse(b)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot use %s: %w", file, err)
	}
	return r, nil
}

func bad(format string, args ...any) error { return fault.New(fault.Invalid, format, args...) }

// Parse decodes and checks a document.
func Parse(b []byte) (*Rules, error) {
	if len(b) > maxDocument {
		return nil, bad("the document is larger than %d bytes", maxDocument)
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	dec.KnownFields(true)
	r := new(Rules)
	if err := dec.Decode(r); err != nil && !errors.Is(err, io.EOF) {
		return nil, fault.As(fault.Invalid, err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, bad("there must be one document only")
	}
	if r.Version != 1 {
		return nil, bad("version is %d; this engine reads version 1", r.Version)
	}
	if r.Interval == 0 {
		r.Interval = Duration(10 * time.Second)
	}
	if r.Interval < Duration(time.Second) {
		return nil, bad("interval must be at least 1s")
	}
	for name, a := range r.Actions {
		if err := a.check(); err != nil {
			return nil, bad("action %s: %w", name, err)
		}
		r.Actions[name] = a
	}
	var seen []string
	for i, x := range r.Rules {
		if x == nil || x.Name == "" {
			return nil, bad("rule %d has no name", i+1)
		}
		if slices.Contains(seen, x.Name) {
			return nil, bad("there are two rules %s", x.Name)
		}
		seen = append(seen, x.Name)
		if err := x.check(r); err != nil {
			return nil, bad("rule %s: %w", x.Name, err)
		}
	}
	return r, nil
}

func (x *Rule) check(r *Rules) error {
	var err error
	if x.expr, err = ParseExpr(x.When); err != nil {
		return err
	}
	for _, a := range x.Actions {
		if _, ok := r.Actions[a]; !ok {
			return fmt.Errorf("there is no action %q", a)
		}
	}
	if x.expr.has("event") && x.For != 0 {
		return errors.New("an event has no duration: leave \"for\" out")
	}
	if x.Repeat != 0 && x.Repeat < Duration(10*time.Second) {
		return errors.New("repeat must be at least 10s")
	}
	for _, p := range []string{x.Match.Name, x.Match.Image} {
		if _, err := path.Match(p, ""); err != nil {
			return fmt.Errorf("cannot read the pattern %q", p)
		}
	}
	return nil
}

func (a *Action) check() error {
	if (a.Webhook == "") == (len(a.Command) == 0) {
		return errors.New("it needs either a webhook or a command")
	}
	if a.Timeout == 0 {
		a.Timeout = Duration(10 * time.Second)
	}
	if a.Timeout > Duration(5*time.Minute) {
		return errors.New("timeout must be at most 5m")
	}
	if a.PerMinute == 0 {
		a.PerMinute = 10
	}
	if a.PerMinute < 0 || a.PerMinute > 600 {
		return errors.New("perMinute must be from 1 to 600")
	}
	if a.Webhook != "" {
		u, err := url.Parse(a.Webhook)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return errors.New("the webhook must be an http or https URL")
		}
		if a.User != "" {
			return errors.New("a webhook has no user")
		}
		for k, v := range a.Headers {
			if k == "" || strings.ContainsAny(k+v, "\r\n") {
				return errors.New("a header is malformed")
			}
		}
		return nil
	}
	if len(a.Headers) > 0 {
		return errors.New("a command has no headers")
	}
	if !filepath.IsAbs(a.Command[0]) {
		return fmt.Errorf("the command must be an absolute path, not %q", a.Command[0])
	}
	if a.User == "" {
		a.User = "nobody"
	}
	u, err := user.Lookup(a.User)
	if err != nil {
		u, err = user.LookupId(a.User)
	}
	if err != nil {
		return fmt.Errorf("cannot find the user %q", a.User)
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if uid == 0 || gid == 0 {
		return fmt.Errorf("a command must not run as %s: name a user without privileges", a.User)
	}
	a.uid, a.gid = uint32(uid), uint32(gid)
	return nil
}
