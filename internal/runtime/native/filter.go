package native

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"os"
	"path/filepath"
	"sync"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plan"
	"github.com/cloudos-io/cloudos/internal/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const filtersKept = 32

// filterCache keeps compiled seccomp programs, by profile, in memory and, for a
// later daemon's execs, in a directory.
type filterCache struct {
	dir string
	mu  sync.Mutex
	mem map[string]*seccomp.Program
}

func newFilterCache(dir string) *filterCache {
	return &filterCache{dir: dir, mem: map[string]*seccomp.Program{}}
}

// key names a profile; "" is none.
func (c *filterCache) key(spec *specs.Spec) string {
	if spec.Linux == nil || spec.Linux.Seccomp == nil {
		return ""
	}
	s := spec.Linux.Seccomp
	// A collision would give a container another's filter: a strong hash. The
	// encoding is unambiguous: every string and list carries its length.
	b := make([]byte, 0, 16384)
	str := func(v string) {
		b = binary.AppendUvarint(b, uint64(len(v)))
		b = append(b, v...)
	}
	num := func(v *uint) {
		if v == nil {
			b = append(b, 0)
			return
		}
		b = binary.AppendUvarint(append(b, 1), uint64(*v))
	}
	str(string(s.DefaultAction))
	num(s.DefaultErrnoRet)
	b = binary.AppendUvarint(b, uint64(len(s.Architectures)))
	for _, a := range s.Architectures {
		str(string(a))
	}
	b = binary.AppendUvarint(b, uint64(len(s.Flags)))
	for _, f := range s.Flags {
		str(string(f))
	}
	for i := range s.Syscalls {
		call := &s.Syscalls[i]
		b = binary.AppendUvarint(b, uint64(len(call.Names)))
		for _, n := range call.Names {
			str(n)
		}
		str(string(call.Action))
		num(call.ErrnoRet)
		b = binary.AppendUvarint(b, uint64(len(call.Args)))
		for _, a := range call.Args {
			b = binary.AppendUvarint(b, uint64(a.Index))
			b = binary.AppendUvarint(b, a.Value)
			b = binary.AppendUvarint(b, a.ValueTwo)
			str(string(a.Op))
		}
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// fill puts the spec's filter into the options and returns its key.
func (c *filterCache) fill(o *plan.Options, spec *specs.Spec) (string, error) {
	key := c.key(spec)
	if key == "" {
		return "", nil
	}
	c.mu.Lock()
	p, ok := c.mem[key]
	c.mu.Unlock()
	if !ok {
		var err error
		if p, err = seccomp.Compile(spec.Linux.Seccomp); err != nil {
			return "", err
		}
		if p != nil {
			if err := c.store(key, p); err != nil {
				return "", err
			}
		}
		c.remember(key, p)
	}
	set(o, p)
	return key, nil
}

func (c *filterCache) remember(key string, p *seccomp.Program) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.mem) >= filtersKept {
		clear(c.mem)
	}
	c.mem[key] = p
}

func set(o *plan.Options, p *seccomp.Program) {
	if p != nil {
		o.Seccomp, o.SeccompFlags, o.SeccompNotify = p.Filter, p.Flags, p.Notify
	}
}

// load puts the filter of a started container into an exec's options.
func (c *filterCache) load(o *plan.Options, key string) error {
	if key == "" {
		return nil
	}
	c.mu.Lock()
	p, ok := c.mem[key]
	c.mu.Unlock()
	if !ok {
		b, err := os.ReadFile(filepath.Join(c.dir, key))
		if os.IsNotExist(err) {
			// A profile that says nothing compiles to nothing and is not stored;
			// then no such file ever was. Refuse rather than run unfiltered.
			return fault.New(fault.Internal, "cannot exec: the container's seccomp filter is lost from %s", c.dir)
		}
		if err != nil {
			return fault.New(fault.Internal, "cannot read the container's seccomp filter: %w", err)
		}
		if len(b) < 8 || len(b)%8 != 0 {
			return fault.New(fault.Internal, "cannot read the container's seccomp filter: it is malformed")
		}
		p = &seccomp.Program{Flags: binary.LittleEndian.Uint32(b), Notify: b[4] != 0, Filter: b[8:]}
		c.remember(key, p)
	}
	set(o, p)
	return nil
}

func (c *filterCache) store(key string, p *seccomp.Program) error {
	b := binary.LittleEndian.AppendUint32(nil, p.Flags)
	b = append(b, 0, 0, 0, 0)
	if p.Notify {
		b[4] = 1
	}
	b = append(b, p.Filter...)
	err := os.MkdirAll(c.dir, 0o700)
	if err == nil {
		err = durable.WriteFile(filepath.Join(c.dir, key), b, 0o600, durable.Nothing)
	}
	if err != nil {
		return fault.New(fault.Internal, "cannot keep a seccomp filter: %w", err)
	}
	return nil
}
