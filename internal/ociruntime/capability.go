package ociruntime

import (
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/plan"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// dropUnknownCapabilities leaves out, with a warning, names that nobody knows and
// ambient capabilities that cannot be: a spec made for a newer kernel is to run.
func dropUnknownCapabilities(log *logger, p *specs.Process) {
	if p.Capabilities == nil {
		p.Capabilities = &specs.LinuxCapabilities{}
		return
	}
	c := *p.Capabilities
	var unknown []string
	for _, set := range []*[]string{&c.Bounding, &c.Effective, &c.Permitted, &c.Inheritable, &c.Ambient} {
		*set = slices.DeleteFunc(slices.Clone(*set), func(name string) bool {
			_, err := plan.CapabilityMask([]string{name})
			if err != nil && !slices.Contains(unknown, name) {
				unknown = append(unknown, name)
			}
			return err != nil
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
