package ociruntime

import (
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/plan"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// dropUnknownCapabilities leaves out, with a warning, names that nobody knows and
// ambient capabilities that cannot be: a spec made for a newer kernel is to run.
// So are those that the runtime itself lacks; in a user namespace of its own a
// container has them all.
func dropUnknownCapabilities(log *logger, p *specs.Process, userNS bool) {
	if p.Capabilities == nil {
		p.Capabilities = &specs.LinuxCapabilities{}
		return
	}
	c := *p.Capabilities
	have := ^uint64(0)
	if !userNS {
		have = boundingSet()
	}
	var unknown []string
	for _, set := range []*[]string{&c.Bounding, &c.Effective, &c.Permitted, &c.Inheritable, &c.Ambient} {
		*set = slices.DeleteFunc(slices.Clone(*set), func(name string) bool {
			m, err := plan.CapabilityMask([]string{name})
			gone := err != nil || m&have == 0
			if gone && !slices.Contains(unknown, name) {
				unknown = append(unknown, name)
			}
			return gone
		})
	}
	if len(unknown) > 0 {
		log.Warnf("ignoring unknown or unavailable capabilities: [%s]", strings.Join(unknown, " "))
	}
	c.Ambient = slices.DeleteFunc(c.Ambient, func(name string) bool {
		ok := slices.Contains(c.Inheritable, name) && slices.Contains(c.Permitted, name)
		if !ok {
			log.Warnf("can't raise ambient capability %s: operation not permitted", name)
		}
		return !ok
	})
	p.Capabilities = &c
}

// boundingSet is what this process could ever pass on.
func boundingSet() uint64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return ^uint64(0)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "CapBnd:"); ok {
			if m, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64); err == nil {
				return m
			}
		}
	}
	return ^uint64(0)
}
