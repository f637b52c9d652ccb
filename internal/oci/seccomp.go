package oci

import (
	"hash/maphash"
	"strings"
	"sync"

	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// maxProfiles bounds the cache: few combinations of profile and capabilities
// are in use at once, and each is tens of kilobytes.
const maxProfiles = 16

// maxProfileSize bounds a profile's JSON; the default one is 15 kB.
const maxProfileSize = 1 << 20

// Profiles caches seccomp profiles resolved for a set of capabilities. The
// profiles it gives are shared: who receives one must not change it, and may use
// the pointer as a cache key.
type Profiles struct {
	custom []byte // replaces the built-in default
	seed   maphash.Seed

	mu sync.Mutex
	m  map[uint64]entry
}

type entry struct {
	key     string
	profile *specs.LinuxSeccomp
}

// NewProfiles makes a cache. custom is the JSON of the engine's own default
// profile, nil for the built-in one.
func NewProfiles(custom []byte) *Profiles {
	return &Profiles{custom: custom, seed: maphash.MakeSeed(), m: make(map[uint64]entry)}
}

// profile resolves "" (the engine's default), "builtin" or JSON for the
// capabilities and architecture of the spec.
func (p *Profiles) profile(name string, spec *specs.Spec) (*specs.LinuxSeccomp, error) {
	key := name + "\x00" + strings.Join(spec.Process.Capabilities.Bounding, ",")
	h := maphash.String(p.seed, key)
	p.mu.Lock()
	e, ok := p.m[h]
	p.mu.Unlock()
	if ok && e.key == key {
		return e.profile, nil
	}

	body := name
	if name == "" && p.custom != nil {
		body = string(p.custom)
	}
	var prof *specs.LinuxSeccomp
	var err error
	switch {
	case len(body) > maxProfileSize:
		return nil, fault.New(fault.Invalid, "cannot load seccomp profile: larger than %d bytes", maxProfileSize)
	case body == "" || body == SeccompBuiltin:
		prof, err = seccomp.GetDefaultProfile(spec)
	default:
		prof, err = seccomp.LoadProfile(body, spec)
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot load seccomp profile: %w", err)
	}
	p.mu.Lock()
	if len(p.m) >= maxProfiles {
		clear(p.m)
	}
	p.m[h] = entry{key, prof}
	p.mu.Unlock()
	return prof, nil
}
