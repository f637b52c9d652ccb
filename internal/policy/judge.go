package policy

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/container"
)

// breach collects what a rule refuses.
type breach struct {
	rule *Rule
	out  []Violation
}

func (b *breach) add(what, fix string) {
	if b.rule.Message != "" {
		fix = b.rule.Message
	}
	if len(b.out) < 20 {
		b.out = append(b.out, Violation{Rule: b.rule.Name, What: what, Fix: fix})
	}
}

// each calls fn for the rules that are about a request.
func (d *Document) each(c Container, fn func(r *Rule, b *breach)) []Violation {
	var out []Violation
	for i := range d.Rules {
		r := &d.Rules[i]
		if !r.When.holds(c) {
			continue
		}
		b := &breach{rule: r}
		fn(r, b)
		out = append(out, b.out...)
	}
	return out
}

func (w *When) holds(c Container) bool {
	if w == nil {
		return true
	}
	names := imageNames(c)
	if len(w.Images) > 0 && !anyImage(w.Images, names) || anyImage(w.NotImages, names) {
		return false
	}
	if len(w.UIDs) > 0 && !(c.Caller.Local && slices.Contains(w.UIDs, c.Caller.UID)) ||
		c.Caller.Local && slices.Contains(w.NotUIDs, c.Caller.UID) {
		return false
	}
	if len(w.Subjects) > 0 && !slices.ContainsFunc(w.Subjects, func(p string) bool { return c.Caller.Subject != "" && match(p, c.Caller.Subject) }) {
		return false
	}
	if len(w.Edges) > 0 && !slices.Contains(w.Edges, c.Caller.Edge) {
		return false
	}
	for k, p := range w.Labels {
		v, ok := "", false
		if c.Config != nil {
			v, ok = c.Config.Labels[k]
		}
		if !ok || !match(p, v) {
			return false
		}
	}
	return true
}

// create evaluates every constraint.
func (d *Document) create(ctx context.Context, c Container, v Verifier) []Violation {
	return d.each(c, func(r *Rule, b *breach) {
		hc := c.HostConfig
		r.Images.check(ctx, c, v, b)
		r.Users.user(c.Config.User, b)
		if hc.Privileged && r.Privileged == "deny" {
			b.add("a privileged container", "leave --privileged out and add the capabilities and devices that are needed")
		}
		r.Capabilities.check("capability", addedCapabilities(hc), b)
		r.HostNamespaces.check("the host's namespace", hostNamespaces(hc), b)
		r.Mounts.check(c.Mounts, b)
		r.Devices.check("device", devices(hc), b)
		r.Networks.check(c.Networks, b)
		r.Sysctls.check("sysctl", sysctls(hc), b)
		r.Unconfined.check("to go without", unconfined(hc), b)
		if hc.Runtime != "" || r.Runtimes != nil && r.Runtimes.Allow != nil {
			rt := hc.Runtime
			if rt == "" {
				rt = "servin"
			}
			r.Runtimes.check("runtime", []string{rt}, b)
		}
		r.Resources.check(&hc.Resources, b)
		if r.ReadOnlyRoot != "" && !hc.ReadonlyRootfs {
			b.add("a writable root file system", "use --read-only, with --tmpfs or volumes for what must be written")
		}
		if r.NoNewPrivs != "" && !noNewPrivileges(hc) {
			b.add("a container whose processes may gain privileges", "use --security-opt no-new-privileges")
		}
		if r.UserNamespace != "" && hc.UsernsMode != "auto" {
			b.add("the host's user ids", "use --userns auto")
		}
	})
}

func (d *Document) exec(x Exec) []Violation {
	return d.each(x.Container, func(r *Rule, b *breach) {
		e := r.Exec
		if e == nil {
			e = &ExecRule{}
		}
		if e.Allowed == "deny" {
			b.add("to execute commands in running containers", "")
		}
		// A privileged command has all capabilities, which the container could not ask for.
		if x.Privileged && (e.Privileged == "deny" || r.Privileged == "deny") {
			b.add("privileged commands", "leave --privileged out")
		} else if x.Privileged {
			r.Capabilities.check("capability", []string{"*"}, b)
		}
		user := x.User
		if user == "" {
			user = x.Config.User
		}
		e.Users.user(user, b)
	})
}

// check refuses what is not chosen.
func (c *Choice) check(what string, asked []string, b *breach) {
	if c == nil {
		return
	}
	for _, a := range asked {
		hit := func(p string) bool { return match(p, a) || a == "*" }
		switch {
		case slices.ContainsFunc(c.Deny, hit):
			b.add(what+" "+shownAs(a), "it is denied")
		case c.Allow != nil && !slices.ContainsFunc(*c.Allow, func(p string) bool { return match(p, a) }):
			fix := "none is allowed"
			if len(*c.Allow) > 0 {
				fix = "allowed are " + strings.Join(*c.Allow, ", ")
			}
			b.add(what+" "+shownAs(a), fix)
		}
	}
}

// shownAs bounds and quotes what a request says.
func shownAs(s string) string {
	if len(s) > 200 {
		s = s[:200] + "…"
	}
	if s == "*" {
		return "all"
	}
	return strconv.Quote(s)
}

func (n *NetworkChoice) check(names []string, b *breach) {
	if n != nil {
		n.Choice.check("network", names, b)
	}
}

func (im *Images) check(ctx context.Context, c Container, v Verifier, b *breach) {
	im.named(c, b)
	im.signed(ctx, c, v, b)
}

// named judges an image by its names.
func (im *Images) named(c Container, b *breach) {
	if im == nil {
		return
	}
	names := imageNames(c)
	all := names
	for _, n := range c.Names {
		all = append(all, normal(n))
	}
	switch {
	case anyImage(im.Deny, all):
		b.add("image "+shownAs(c.Image), "it is denied")
	case im.Allow != nil && !anyImage(*im.Allow, names):
		fix := "none is allowed"
		if len(*im.Allow) > 0 {
			fix = "allowed are " + strings.Join(*im.Allow, ", ")
		}
		b.add("image "+shownAs(c.Image), fix)
	}
	if im.Digest != "" {
		if r, err := reference.ParseNormalizedNamed(c.Image); err == nil {
			if _, ok := r.(reference.Digested); !ok {
				b.add("image "+shownAs(c.Image), "name it by digest: NAME@sha256:…")
			}
		}
	}
}

// signed asks for the signatures that a rule wants.
func (im *Images) signed(ctx context.Context, c Container, v Verifier, b *breach) {
	if im != nil && len(im.SignedBy) > 0 {
		switch {
		case v == nil:
			b.add("image "+shownAs(c.Image), "it must be signed, and this engine has nothing that checks signatures")
		case c.Digest == "":
			b.add("image "+shownAs(c.Image), "it must be signed, and has no digest that a signature could be of")
		default:
			if err := v.Verify(ctx, c.Image, c.Digest, im.SignedBy); err != nil {
				b.add("image "+shownAs(c.Image), "it is not signed as it must be: "+err.Error())
			}
		}
	}
}

// imageNames are the names that stand for the image of a request: the reference,
// or all names of an image that was asked for by its id.
func imageNames(c Container) []string {
	if n := normal(c.Image); n != "" && !strings.HasPrefix(c.ImageID, "sha256:"+c.Image) && c.Image != c.ImageID {
		return []string{n}
	}
	var out []string
	for _, n := range c.Names {
		out = append(out, normal(n))
	}
	return out
}

// normal is a reference with its registry and tag; "" for what is none.
func normal(ref string) string {
	r, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ""
	}
	return reference.TagNameOnly(r).String()
}

// anyImage matches patterns against normal references. A pattern without a tag or
// digest is about all of them; one without a registry is about docker.io.
func anyImage(patterns, names []string) bool {
	for _, p := range patterns {
		for _, n := range names {
			if n == "" {
				continue
			}
			if matchImage(p, n) {
				return true
			}
		}
	}
	return false
}

func matchImage(p, name string) bool {
	if p == "*" {
		p = "**" // an image, whatever its name
	}
	repo, rest := splitReference(name)
	prepo, prest := splitReference(p)
	if prest != "" && !match(prest, rest) && !strings.HasPrefix(rest, prest+"@") {
		return false
	}
	if match(prepo, repo) {
		return true
	}
	short, ok := strings.CutPrefix(repo, "docker.io/")
	if !ok {
		return false
	}
	if match(prepo, short) && !strings.HasPrefix(prepo, "*") {
		return true
	}
	short, ok = strings.CutPrefix(short, "library/")
	return ok && !strings.HasPrefix(prepo, "*") && match(prepo, short)
}

// splitReference cuts tag and digest off.
func splitReference(s string) (repo, rest string) {
	slash := strings.LastIndexByte(s, '/')
	if i := strings.IndexAny(s[slash+1:], ":@"); i >= 0 {
		i += slash + 1
		return s[:i], strings.TrimLeft(s[i:], ":@")
	}
	return s, ""
}

// match compares with a pattern: "*" stands for anything but a slash, "**" for
// anything. It takes no more than linear time and space in each.
func match(pattern, s string) bool {
	type at struct{ p, s int }
	var star, double at
	star.p, double.p = -1, -1
	p, i := 0, 0
	for {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			if strings.HasPrefix(pattern[p:], "**") {
				p += 2
				double, star.p = at{p, i}, -1
			} else {
				p++
				star = at{p, i}
			}
			continue
		case i < len(s) && p < len(pattern) && pattern[p] == s[i]:
			p++
			i++
			continue
		case i == len(s) && p == len(pattern):
			return true
		}
		if star.p >= 0 && star.s < len(s) && s[star.s] != '/' {
			star.s++
			p, i = star.p, star.s
			continue
		}
		if double.p >= 0 && double.s < len(s) {
			double.s++
			star.p = -1
			p, i = double.p, double.s
			continue
		}
		return false
	}
}

func (u *Users) check() error {
	for _, a := range allowed(u.Allow) {
		if lo, hi, ok := strings.Cut(a, "-"); ok {
			l, err1 := strconv.ParseUint(lo, 10, 32)
			h, err2 := strconv.ParseUint(hi, 10, 32)
			if err1 == nil && (err2 != nil || h < l) {
				return fmt.Errorf("users.allow: %q is no range", a)
			}
		}
		if a == "" {
			return errors.New("users.allow: a user is empty")
		}
	}
	return nil
}

// user checks as whom something runs: NAME|ID[:GROUP], "" is root.
func (u *Users) user(user string, b *breach) {
	if u == nil {
		return
	}
	name, _, _ := strings.Cut(user, ":")
	if name == "" {
		name = "0"
	}
	id, err := strconv.ParseUint(name, 10, 32)
	numeric := err == nil
	switch {
	case u.NonRoot && numeric && id == 0, u.NonRoot && name == "root":
		b.add("to run as root", "use --user with an id that is not 0")
		return
	case u.NonRoot && !numeric:
		b.add("user "+shownAs(name), "only the image says which id that is: use --user with a number")
		return
	}
	if u.Allow == nil {
		return
	}
	for _, a := range *u.Allow {
		if a == name || a == "root" && numeric && id == 0 {
			return
		}
		lo, hi, ok := strings.Cut(a, "-")
		l, err1 := strconv.ParseUint(lo, 10, 32)
		h, err2 := strconv.ParseUint(hi, 10, 32)
		if ok && numeric && err1 == nil && err2 == nil && l <= id && id <= h {
			return
		}
	}
	b.add("user "+shownAs(name), "allowed are "+strings.Join(*u.Allow, ", "))
}

func (m *Mounts) check(list []Mount, b *breach) {
	if m == nil {
		return
	}
	for _, x := range list {
		kind := x.Type
		if kind == "volume" && x.Device != "" {
			kind = "device"
		}
		what := "a " + kind + " mount at " + shownAs(x.Target)
		if x.Volume != "" {
			what = "volume " + shownAs(x.Volume) + ", which binds " + shownAs(x.Source)
		} else if x.Target == "" {
			what = "a " + kind + " mount of " + shownAs(x.Source+x.Device)
		}
		if m.Types != nil && !slices.Contains(*m.Types, kind) {
			b.add(what, "allowed types are "+strings.Join(*m.Types, ", "))
			continue
		}
		if kind == "device" && m.Types == nil && m.Binds != nil {
			b.add(what, "volumes that mount devices are allowed by mounts.types alone")
			continue
		}
		if kind != "bind" || m.Binds == nil {
			continue
		}
		m.bind(x, b)
	}
}

func (m *Mounts) bind(x Mount, b *breach) {
	src := path.Clean(x.Source)
	readOnly := false
	var list []string
	for _, d := range *m.Binds {
		if src == d.Source || strings.HasPrefix(src, strings.TrimSuffix(d.Source, "/")+"/") {
			if !d.ReadOnly || x.ReadOnly {
				return
			}
			readOnly = true
		}
		list = append(list, d.Source)
	}
	switch {
	case readOnly:
		b.add("to bind "+shownAs(src)+" writable", "bind it read-only")
	case len(list) == 0:
		b.add("to bind "+shownAs(src), "no directory of the host may be bound: use a volume")
	default:
		b.add("to bind "+shownAs(src), "allowed are "+strings.Join(list, ", ")+" and what is below")
	}
}

func (l *Resources) check(r *container.Resources, b *breach) {
	if l == nil {
		return
	}
	cpus := float64(r.NanoCPUs) / 1e9
	if cpus == 0 && r.CPUQuota > 0 {
		period := r.CPUPeriod
		if period <= 0 {
			period = 100000
		}
		cpus = float64(r.CPUQuota) / float64(period)
	}
	pids := 0.0
	if r.PidsLimit != nil && *r.PidsLimit > 0 {
		pids = float64(*r.PidsLimit)
	}
	l.Memory.check("memory", "--memory", float64(r.Memory), b)
	l.CPUs.check("cpus", "--cpus", cpus, b)
	l.Pids.check("processes", "--pids-limit", pids, b)
}

func (l *Limit) check(what, flag string, have float64, b *breach) {
	switch {
	case l == nil:
	case have <= 0 && (l.Required || l.Max != ""):
		b.add("a container without a limit of "+what, "set "+flag+l.atMost())
	case l.Max != "" && have > l.max:
		b.add("a limit of "+what+" that is too high", "set "+flag+l.atMost())
	}
}

func (l *Limit) atMost() string {
	if l.Max == "" {
		return ""
	}
	return " to " + l.Max + " at most"
}
