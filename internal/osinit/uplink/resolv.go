package uplink

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/durable"
)

// writeResolv writes the name servers.
func (n *Net) writeResolv() error {
	var b bytes.Buffer
	servers, search := slices.Clone(n.cfg.DNS), slices.Clone(n.cfg.Search)
	n.mu.Lock()
	for _, l := range n.links {
		if l.lease != nil {
			servers = append(servers, l.lease.DNS...)
			search = append(search, l.lease.Search...)
		}
	}
	if len(n.cfg.DNS) == 0 {
		for _, name := range slices.Sorted(maps.Keys(n.links)) {
			s, d := n.links[name].announced(name)
			servers, search = append(servers, s...), append(search, d...)
		}
	}
	n.mu.Unlock()
	for i, s := range servers {
		if !slices.Contains(servers[:i], s) {
			fmt.Fprintf(&b, "nameserver %s\n", s)
		}
	}
	if s := names(search); len(s) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(s, " "))
	}
	if err := durable.WriteFile(n.resolv, b.Bytes(), 0o644, durable.Nothing); err != nil {
		return fmt.Errorf("cannot write the name servers: %w", err)
	}
	return nil
}

// names keeps what can be a domain's name: DHCP may say anything.
func names(in []string) []string {
	var out []string
	for _, s := range in {
		ok := s != "" && len(s) < 254 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_") == ""
		if ok && !slices.Contains(out, s) && len(out) < 6 {
			out = append(out, s)
		}
	}
	return out
}
