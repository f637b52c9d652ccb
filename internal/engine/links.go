package engine

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// sortedEndpoints orders networks: the main one first, then by gateway
// priority, then by name.
func sortedEndpoints(r *container.Record, eps map[string]*network.EndpointSettings) []string {
	names := make([]string, 0, len(eps))
	for n := range eps {
		names = append(names, n)
	}
	if len(names) < 2 {
		return names
	}
	first := networkName(r.HostConfig.NetworkMode)
	slices.SortFunc(names, func(a, b string) int {
		if (a == first) != (b == first) {
			if a == first {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(eps[b].GwPriority, eps[a].GwPriority), cmp.Compare(a, b))
	})
	return names
}

// link is one legacy link, resolved.
type link struct {
	to    *unit
	alias string
}

// cutLink splits "container[:alias]".
func cutLink(l string) (name, alias string) {
	name, alias, ok := strings.Cut(l, ":")
	if !ok || alias == "" {
		alias = name
	}
	return name, alias[strings.LastIndexByte(alias, '/')+1:]
}

func (e *Engine) links(r *container.Record) ([]link, error) {
	var out []link
	for _, l := range r.HostConfig.Links {
		name, alias := cutLink(l)
		u, err := e.lookup(name)
		if err != nil {
			if !legacyLinks(r) {
				continue // on networks of the user's it may come later
			}
			return nil, err
		}
		out = append(out, link{u, alias})
	}
	return out, nil
}

// bridged is where the default bridge reaches a container, itself or by the one whose
// network it shares; nil where it does not.
func (e *Engine) bridged(r *container.Record) *network.EndpointSettings {
	for range maxShared {
		m := r.HostConfig.NetworkMode
		if !m.IsContainer() {
			return r.Attached[network.NetworkBridge]
		}
		u, err := e.other(m.ConnectedContainer())
		if err != nil {
			return nil
		}
		r = u.rec.Load()
	}
	return nil
}

// maxShared bounds how many containers share a network one by the other.
const maxShared = 16

// linkHosts are the lines of the hosts file for links on the default bridge.
func (e *Engine) linkHosts(r *container.Record) []hostEntry {
	links, err := e.links(r)
	if err != nil {
		return nil
	}
	var out []hostEntry
	for _, l := range links {
		lr := l.to.rec.Load()
		names := l.alias
		for _, n := range []string{lr.Config.Hostname, lr.Name} {
			if n != l.alias {
				names += " " + n
			}
		}
		if ep := e.bridged(lr); ep != nil && ep.IPAddress.IsValid() {
			out = append(out, hostEntry{ep.IPAddress, names})
		}
	}
	return out
}

// linkEnv are the variables that links give, for containers on the default bridge.
func (e *Engine) linkEnv(r *container.Record) ([]string, error) {
	if len(r.HostConfig.Links) == 0 {
		return nil, nil
	}
	links, err := e.links(r)
	if err != nil {
		return nil, err
	}
	var env []string
	for _, l := range links {
		lr := l.to.rec.Load()
		ep := e.bridged(lr)
		if networkName(r.HostConfig.NetworkMode) != network.NetworkBridge {
			continue
		}
		if !lr.State.Running() || ep == nil {
			return nil, fault.New(fault.Conflict, "Cannot link to a non running container: /%s AS /%s/%s", lr.Name, r.Name, l.alias)
		}
		a := strings.ToUpper(strings.ReplaceAll(l.alias, "-", "_"))
		env = append(env, fmt.Sprintf("%s_NAME=/%s/%s", a, r.Name, l.alias))
		ports := make([]network.Port, 0, len(lr.Config.ExposedPorts))
		for p := range lr.Config.ExposedPorts {
			ports = append(ports, p)
		}
		slices.SortFunc(ports, func(x, y network.Port) int {
			return cmp.Or(cmp.Compare(x.Num(), y.Num()), cmp.Compare(x.Proto(), y.Proto()))
		})
		for i, p := range ports {
			url := fmt.Sprintf("%s://%s:%d", p.Proto(), ep.IPAddress, p.Num())
			if i == 0 {
				env = append(env, a+"_PORT="+url)
			}
			pre := fmt.Sprintf("%s_PORT_%d_%s", a, p.Num(), strings.ToUpper(string(p.Proto())))
			env = append(env, pre+"="+url, fmt.Sprintf("%s_ADDR=%s", pre, ep.IPAddress), fmt.Sprintf("%s_PORT=%d", pre, p.Num()), fmt.Sprintf("%s_PROTO=%s", pre, p.Proto()))
		}
		for _, v := range lr.Config.Env {
			if k, val, ok := strings.Cut(v, "="); ok && k != "PATH" && k != "HOME" && k != "TERM" {
				env = append(env, fmt.Sprintf("%s_ENV_%s=%s", a, k, val))
			}
		}
	}
	return env, nil
}
