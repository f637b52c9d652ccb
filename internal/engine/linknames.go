package engine

import (
	"context"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Legacy links have names of their own: a container that is linked to is also
// called /PARENT/ALIAS. They are shown as old clients expect, and made of the
// links as they were asked for, so that a renamed container stays linked.

// legacyLinks tells whether the links of a container are of the old kind: on
// networks of the user's they are ordinary aliases.
func legacyLinks(r *container.Record) bool {
	return len(r.HostConfig.Links) > 0 && !r.HostConfig.NetworkMode.IsUserDefined()
}

// shownLinks are a container's links as inspect shows them.
func (e *Engine) shownLinks(r *container.Record) []string {
	links, err := e.links(r)
	if err != nil || !legacyLinks(r) {
		return r.HostConfig.Links // what was linked to is gone
	}
	out := make([]string, 0, len(links))
	for _, l := range links {
		out = append(out, "/"+l.to.rec.Load().Name+":/"+r.Name+"/"+l.alias)
	}
	return out
}

// linkNames are the further names of containers that are linked to.
func (e *Engine) linkNames(records []*container.Record) map[string][]string {
	var names map[string][]string
	for _, r := range records {
		if !legacyLinks(r) {
			continue
		}
		links, err := e.links(r)
		if err != nil {
			continue
		}
		for _, l := range links {
			if names == nil {
				names = map[string][]string{}
			}
			names[l.to.id] = append(names[l.to.id], "/"+r.Name+"/"+l.alias)
		}
	}
	for _, n := range names {
		slices.Sort(n)
	}
	return names
}

// checkLinks refuses links to containers that there are not, before anything is
// made, and pins the others to their ids.
func (e *Engine) checkLinks(r *container.Record) error {
	if !legacyLinks(r) {
		return nil
	}
	for i, l := range r.HostConfig.Links {
		name, alias := cutLink(l)
		u, err := e.lookup(name)
		if err != nil {
			return fault.New(fault.Invalid, "could not get container for %s: %v", name, err)
		}
		if m := u.rec.Load().HostConfig.NetworkMode; m.IsHost() {
			return fault.New(fault.Invalid, "conflicting options: host type networking can't be used with links. This would result in undefined behavior")
		}
		r.HostConfig.Links[i] = u.id + ":" + alias
	}
	return nil
}

// removeLink takes the link PARENT/ALIAS away; the containers stay.
func (e *Engine) removeLink(ctx context.Context, name string) error {
	parent, alias, ok := strings.Cut(strings.TrimPrefix(name, "/"), "/")
	if !ok || alias == "" {
		return fault.New(fault.Invalid, "Could not get link name for %s: name it PARENT/ALIAS", name)
	}
	u, err := e.lookup(parent)
	if err != nil {
		return err
	}
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	r := u.rec.Load()
	keep := slices.DeleteFunc(slices.Clone(r.HostConfig.Links), func(l string) bool {
		_, a := cutLink(l)
		return a == alias
	})
	if len(keep) == len(r.HostConfig.Links) {
		return fault.New(fault.NotFound, "No such link: %s", name)
	}
	if len(keep) == 0 {
		keep = nil
	}
	hc := *r.HostConfig
	hc.Links = keep
	_, p, err := e.change(u, func(n *container.Record) { n.HostConfig = &hc })
	if err == nil {
		err = p.Wait()
	}
	return err
}

// byLinkLocked finds the container that PARENT calls ALIAS; e.mu is held.
func (e *Engine) byLinkLocked(parent, alias string) *unit {
	id, ok := e.names.Lookup(parent)
	if !ok {
		return nil
	}
	p := e.units[id]
	if p == nil {
		return nil
	}
	r := p.rec.Load()
	if !legacyLinks(r) {
		return nil
	}
	for _, l := range r.HostConfig.Links {
		if to, a := cutLink(l); a == alias {
			return e.units[to]
		}
	}
	return nil
}
