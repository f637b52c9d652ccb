package engine

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
)

func uitoa(n uint64) string { return strconv.FormatUint(n, 10) }

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err
}

func badFilter(key string, value string) error {
	return fault.New(fault.Invalid, "invalid filter '%s=%s'", key, value)
}

// checkFilters refuses keys that a list does not know.
func checkFilters(f Filters, known ...string) error {
	for k := range f {
		if !slices.Contains(known, k) {
			return fault.New(fault.Invalid, "invalid filter '%s'", k)
		}
	}
	return nil
}

// values lists what a filter asks for.
func values(f Filters, key string) []string {
	var out []string
	for v, on := range f[key] {
		if on {
			out = append(out, v)
		}
	}
	return out
}

// truth reads a boolean filter; given is false without one.
func truth(f Filters, key string) (value, given bool, err error) {
	for _, v := range values(f, key) {
		b, err := strconv.ParseBool(v)
		if err != nil || given && b != value {
			return false, false, badFilter(key, v)
		}
		value, given = b, true
	}
	return value, given, nil
}

// labelsMatch tells whether labels hold every "key" or "key=value".
func labelsMatch(labels map[string]string, want []string) bool {
	for _, w := range want {
		k, v, eq := strings.Cut(w, "=")
		have, ok := labels[k]
		if !ok || eq && have != v {
			return false
		}
	}
	return true
}

// listFilter is a container list's filter, each part checked when it was made.
type listFilter struct {
	all           bool
	e             *Engine
	ids           []string
	names         []*regexp.Regexp
	labels        []string
	annotations   []string
	states        []string
	health        []string
	exited        []int
	images        []string // ids, and names as asked
	volumes       []string
	networks      []string
	publish       []portRange
	expose        []portRange
	before, since *container.Record
	task          bool
	isTask        bool
	filters       Filters
}

type portRange struct {
	lo, hi uint16
	proto  string
}

func parsePortRange(s string) (portRange, error) {
	p, proto, ok := strings.Cut(s, "/")
	if !ok {
		proto = "tcp"
	}
	lo, hi, isRange := strings.Cut(p, "-")
	a, err := parsePort(lo)
	if err != nil {
		return portRange{}, err
	}
	b := a
	if isRange {
		if b, err = parsePort(hi); err != nil {
			return portRange{}, err
		}
	}
	return portRange{a, b, proto}, nil
}

func (e *Engine) listFilter(o ListOptions) (*listFilter, error) {
	f := o.Filters
	l := &listFilter{all: o.All || o.Limit > 0, e: e, filters: f}
	if len(f) == 0 {
		return l, nil
	}
	if err := checkFilters(f, "ancestor", "annotation", "before", "exited", "expose", "health", "id", "isolation", "is-task", "label", "name", "namespace", "network", "publish", "since", "status", "volume"); err != nil {
		return nil, err
	}
	l.ids, l.labels, l.volumes, l.networks = values(f, "id"), values(f, "label"), values(f, "volume"), values(f, "network")
	l.annotations = values(f, "annotation")
	for _, n := range values(f, "name") {
		re, err := regexp.Compile(n)
		if err != nil {
			return nil, badFilter("name", n)
		}
		l.names = append(l.names, re)
	}
	for _, s := range values(f, "status") {
		if mcontainer.ValidateContainerState(mcontainer.ContainerState(s)) != nil {
			return nil, badFilter("status", s)
		}
		l.states, l.all = append(l.states, s), true
	}
	for _, h := range values(f, "health") {
		if mcontainer.ValidateHealthStatus(mcontainer.HealthStatus(h)) != nil {
			return nil, badFilter("health", h)
		}
		l.health = append(l.health, h)
	}
	for _, x := range values(f, "exited") {
		n, err := strconv.Atoi(x)
		if err != nil {
			return nil, badFilter("exited", x)
		}
		l.exited = append(l.exited, n)
	}
	for key, to := range map[string]*[]portRange{"publish": &l.publish, "expose": &l.expose} {
		for _, v := range values(f, key) {
			p, err := parsePortRange(v)
			if err != nil {
				return nil, badFilter(key, v)
			}
			*to = append(*to, p)
		}
	}
	for key, to := range map[string]**container.Record{"before": &l.before, "since": &l.since} {
		for _, v := range values(f, key) {
			u, err := e.lookup(v)
			if err != nil {
				return nil, err
			}
			*to = u.rec.Load()
		}
	}
	l.images = values(f, "ancestor")
	for _, v := range l.images {
		if img, err := e.cfg.Images.Resolve(e.ctx, v, ""); err == nil {
			l.images = append(l.images, img.ID.String())
		}
	}
	var err error
	l.isTask, l.task, err = truth(f, "is-task")
	return l, err
}

func (l *listFilter) match(r *container.Record) bool {
	if !inNamespace(l.filters, r.Pod != nil) {
		return false
	}
	st := r.State
	any := func(n int, fn func(i int) bool) bool {
		for i := range n {
			if fn(i) {
				return true
			}
		}
		return n == 0
	}
	health := mcontainer.NoHealthcheck
	if st.Health != nil {
		health = st.Health.Status
	}
	switch {
	case !l.all && !st.Running() && st.Status != mcontainer.StateRestarting:
		return false
	case l.task && l.isTask:
		return false
	case !any(len(l.ids), func(i int) bool { return strings.HasPrefix(r.ID, l.ids[i]) }):
		return false
	case !any(len(l.names), func(i int) bool { return l.names[i].MatchString("/"+r.Name) || l.names[i].MatchString(r.Name) }):
		return false
	case !labelsMatch(r.Config.Labels, l.labels), !labelsMatch(r.HostConfig.Annotations, l.annotations):
		return false
	case len(l.states) > 0 && !slices.Contains(l.states, string(st.Status)):
		return false
	case len(l.health) > 0 && !slices.Contains(l.health, string(health)):
		return false
	case len(l.exited) > 0 && (st.Status != mcontainer.StateExited || !slices.Contains(l.exited, st.ExitCode)):
		return false
	case len(l.images) > 0 && !slices.Contains(l.images, r.Image.ID) && !slices.Contains(l.images, r.Image.Ref):
		return false
	case l.before != nil && !r.Created.Before(l.before.Created), l.since != nil && !r.Created.After(l.since.Created):
		return false
	case !any(len(l.volumes), func(i int) bool { return hasVolume(r, l.volumes[i]) }):
		return false
	case !any(len(l.networks), func(i int) bool { return hasNetwork(r, l.networks[i]) }):
		return false
	case !any(len(l.publish), func(i int) bool { return hasPort(r, l.publish[i], true) }):
		return false
	case !any(len(l.expose), func(i int) bool { return hasPort(r, l.expose[i], false) }):
		return false
	}
	return true
}

// hasPort looks among the ports that a list shows: of the host, or of the container.
func hasPort(r *container.Record, want portRange, public bool) bool {
	for _, p := range portSummary(r) {
		n := p.PrivatePort
		if public {
			n = p.PublicPort
		}
		if n != 0 && p.Type == want.proto && n >= want.lo && n <= want.hi {
			return true
		}
	}
	return false
}

func hasVolume(r *container.Record, want string) bool {
	for _, p := range r.Mounts {
		if p.Name == want || p.Target == want || p.Source == want {
			return true
		}
	}
	return false
}

func hasNetwork(r *container.Record, want string) bool {
	for _, eps := range []map[string]*network.EndpointSettings{r.Attached, r.Endpoints} {
		for name, ep := range eps {
			if name == want || ep.NetworkID != "" && strings.HasPrefix(ep.NetworkID, want) {
				return true
			}
		}
	}
	return false
}

// pruneFilter makes the test of what prune requests may remove.
func pruneFilter(f Filters) (func(created time.Time, labels map[string]string) bool, error) {
	if err := checkFilters(f, "until", "label", "label!"); err != nil {
		return nil, err
	}
	var until time.Time
	for _, v := range values(f, "until") {
		t, err := parseTime(v, time.Now())
		if err != nil {
			return nil, badFilter("until", v)
		}
		if !until.IsZero() {
			return nil, fault.New(fault.Invalid, "more than one until filter specified")
		}
		until = t
	}
	with, without := values(f, "label"), values(f, "label!")
	return func(created time.Time, labels map[string]string) bool {
		if !until.IsZero() && created.After(until) || !labelsMatch(labels, with) {
			return false
		}
		for _, w := range without {
			if labelsMatch(labels, []string{w}) {
				return false
			}
		}
		return true
	}, nil
}

// parseTime reads a point in time: a duration before now, a unix time, RFC 3339
// or a date.
func parseTime(s string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	if sec, frac, _ := strings.Cut(s, "."); sec != "" {
		if n, err := strconv.ParseInt(sec, 10, 64); err == nil {
			ns := int64(0)
			if frac != "" {
				if ns, err = strconv.ParseInt((frac + "000000000")[:9], 10, 64); err != nil {
					return time.Time{}, err
				}
			}
			return time.Unix(n, ns), nil
		}
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fault.New(fault.Invalid, "cannot read time %q", s)
}
