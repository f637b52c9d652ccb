package network

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/nft"
)

// consents are the accepts in the host's own firewall that the user agreed to.
// They are durable, because ufw and firewalld keep their rules on disk: what
// was put there is known even when the engine was killed in between.
type consents struct {
	dir string

	mu   sync.Mutex
	list []consent
	err  error
}

// consent is one bridge's accept in one firewall.
type consent struct {
	Link string
	Kind string // see kinds
	// Boot is the kernel's run that the rule was put into.
	Boot string
	// Away: taken out by Destroy, to be put back by the next engine.
	Away bool `json:",omitempty"`
}

const consentFile = "firewall.json"

// kinds are the names of firewalls in records.
var kinds = map[nft.Kind]string{nft.Admin: "nftables", nft.Docker: "docker", nft.UFW: "ufw", nft.Firewalld: "firewalld"}

func newConsents(root string) *consents {
	c := &consents{dir: root}
	b, err := os.ReadFile(filepath.Join(root, consentFile))
	if errors.Is(err, fs.ErrNotExist) {
		return c
	}
	var rec struct {
		Version int
		Accepts []consent
	}
	if err == nil {
		err = json.Unmarshal(b, &rec)
	}
	if err == nil && rec.Version > recordVersion {
		err = fmt.Errorf("version %d is newer than this engine", rec.Version)
	}
	if err != nil {
		c.err = fmt.Errorf("cannot read what was put into the host's firewall (%s): %w", filepath.Join(root, consentFile), err)
	}
	c.list = rec.Accepts
	return c
}

// edit changes the list and writes it down.
func (c *consents) edit(fn func([]consent) []consent) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	after := fn(slices.Clone(c.list))
	if slices.Equal(after, c.list) {
		return nil
	}
	if err := writeRecord(c.dir, consentFile, struct {
		Version int
		Accepts []consent
	}{recordVersion, after}, durable.Everything); err != nil {
		return err
	}
	c.list = after
	return nil
}

func (c *consents) all() []consent {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.list)
}

func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// AllowForward puts the narrow accepts that Doctor offers into the host's own
// firewall: for each of our bridges, in the one place that drops, and nothing
// else. It is to be called only when the user agreed: actions are those of
// Doctor's findings that he was shown, and no other is carried out. The accepts
// go with their network. done tells what was done.
func (m *Manager) AllowForward(ctx context.Context, actions []string) (done []string, err error) {
	m.up()
	if m.broken != nil {
		return nil, m.broken
	}
	m.makeMu.Lock() // no network comes or goes meanwhile
	defer m.makeMu.Unlock()
	host, err := nft.Inspect(m.table.Name())
	if err != nil {
		return nil, err
	}
	left := slices.Clone(actions)
	var errs error
	for _, d := range m.drops(host) {
		i := slices.Index(left, d.action())
		if i < 0 {
			continue
		}
		left = slices.Delete(left, i, i+1)
		if err := m.allow(ctx, d); err != nil {
			errs = errors.Join(errs, fmt.Errorf("cannot %s: %w", d.action(), err))
			continue
		}
		done = append(done, d.action())
	}
	if errs == nil && len(left) > 0 {
		errs = fault.New(fault.Conflict, "cannot %s: the host's firewall has changed since; run servin system doctor again", left[0])
	}
	return done, errs
}

// allow makes one accept, and remembers it first.
func (m *Manager) allow(ctx context.Context, d drop) error {
	kind := kinds[d.chain.Kind]
	err := m.consents.edit(func(l []consent) []consent {
		for _, link := range d.links {
			l = slices.DeleteFunc(l, func(c consent) bool { return c.Link == link && c.Kind == kind })
			l = append(l, consent{Link: link, Kind: kind, Boot: bootID()})
		}
		slices.SortFunc(l, func(a, b consent) int {
			return cmp.Or(strings.Compare(a.Link, b.Link), strings.Compare(a.Kind, b.Kind))
		})
		return l
	})
	if err != nil {
		return err
	}
	switch d.chain.Kind {
	case nft.UFW:
		return runAll(ctx, ufwCommands(d.links, false))
	case nft.Firewalld:
		return m.zone().allow(ctx, d.links)
	}
	return d.chain.Allow(d.links, m.table.Name())
}

// revoke takes out the accepts of a link, or of all if it is "". With keep they
// are put back by the next engine.
func (m *Manager) revoke(ctx context.Context, link string, keep bool) error {
	errs := nft.Revoke(m.table.Name(), link)
	mine := func(c consent) bool { return link == "" || c.Link == link }
	var ufw, zoned []string
	for _, c := range m.consents.all() {
		switch {
		case !mine(c) || c.Away:
		case c.Kind == kinds[nft.UFW]:
			ufw = append(ufw, c.Link)
		case c.Kind == kinds[nft.Firewalld]:
			zoned = append(zoned, c.Link)
		}
	}
	failed := map[string]bool{}
	var gone *exec.Error
	if err := runAll(ctx, ufwCommands(ufw, true)); err != nil && !errors.As(err, &gone) { // ufw may have left the host
		failed[kinds[nft.UFW]], errs = true, errors.Join(errs, err)
	}
	if err := m.zone().revoke(ctx, zoned); err != nil {
		failed[kinds[nft.Firewalld]], errs = true, errors.Join(errs, err)
	}
	return errors.Join(errs, m.consents.edit(func(l []consent) []consent {
		if !keep {
			return slices.DeleteFunc(l, func(c consent) bool { return mine(c) && !failed[c.Kind] })
		}
		for i := range l {
			l[i].Away = l[i].Away || mine(l[i]) && !failed[l[i].Kind]
		}
		return l
	}))
}

// reallow puts back the accepts that were agreed to and that Destroy, a new
// start of the host or a flush took away.
func (m *Manager) reallow(ctx context.Context, flushed bool) error {
	var lost []consent
	boot := bootID()
	for _, c := range m.consents.all() {
		inKernel := c.Kind == kinds[nft.Admin] || c.Kind == kinds[nft.Docker]
		if c.Away || inKernel && (flushed || c.Boot != boot) {
			lost = append(lost, c)
		}
	}
	if len(lost) == 0 {
		return nil
	}
	m.makeMu.Lock()
	defer m.makeMu.Unlock()
	host, err := nft.Inspect(m.table.Name())
	if err != nil {
		return err
	}
	var errs error
	for _, d := range m.drops(host) {
		d.links = slices.DeleteFunc(d.links, func(l string) bool {
			return !slices.ContainsFunc(lost, func(c consent) bool { return c.Link == l && c.Kind == kinds[d.chain.Kind] })
		})
		if len(d.links) > 0 {
			errs = errors.Join(errs, m.allow(ctx, d))
		}
	}
	return errs
}

// script shows commands to people.
func script(cmds [][]string) string {
	var s []string
	for _, c := range cmds {
		s = append(s, strings.Join(c, " "))
	}
	return strings.Join(s, "; ")
}

// ufwCommands allow forwarding from and to links, or undo it. ufw takes a rule
// that it has, and the removal of one that it has not, without complaint.
func ufwCommands(links []string, undo bool) (out [][]string) {
	for _, l := range links {
		for _, way := range []string{"in", "out"} {
			if undo {
				out = append(out, []string{"ufw", "route", "delete", "allow", way, "on", l})
			} else {
				out = append(out, []string{"ufw", "route", "allow", way, "on", l})
			}
		}
	}
	return out
}

// toolTimeout is what a firewall's tool may take; firewalld reloads in it.
const toolTimeout = 30 * time.Second

// runAll runs the tools of a firewall one after another.
func runAll(ctx context.Context, cmds [][]string) error {
	for _, c := range cmds {
		if _, err := tool(ctx, c...); err != nil {
			return err
		}
	}
	return nil
}

// tool runs one, and gives what it printed. It is not cut short with its
// caller: half a change of the host's firewall is worse than a late one.
func tool(ctx context.Context, argv ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), toolTimeout)
	defer cancel()
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.Env = append(os.Environ(), "LC_ALL=C")
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	c.WaitDelay = time.Second
	if err := c.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return "", fault.New(fault.Unsupported, "cannot use the firewall's own tool: %w", err)
		}
		text := strings.Join(strings.Fields(out.String()), " ")
		return "", fault.New(fault.Internal, "cannot run %s: %w: %.400s", strings.Join(argv, " "), err, text)
	}
	return strings.TrimSpace(out.String()), nil
}
