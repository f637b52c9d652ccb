package seccomp

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"io"
	"slices"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Key identifies a compiled profile. Rules that depend on capabilities,
// architecture or kernel have been decided when a profile is of the runtime
// spec's kind, so its content is the whole key; a compiled program must not be
// kept across kernels or architectures all the same, and a Cache is not.
type Key [sha256.Size]byte

// KeyOf digests everything in the profile that the filter depends on.
func KeyOf(cfg *specs.LinuxSeccomp) Key {
	h := sha256.New()
	d := digest{h, make([]byte, 0, 64)}
	d.str(string(cfg.DefaultAction))
	d.errno(cfg.DefaultErrnoRet)
	d.num(uint64(len(cfg.Architectures)))
	for _, a := range cfg.Architectures {
		d.str(string(a))
	}
	if cfg.Flags == nil {
		d.num(1 << 32)
	}
	d.num(uint64(len(cfg.Flags)))
	for _, f := range cfg.Flags {
		d.str(string(f))
	}
	for i := range cfg.Syscalls {
		c := &cfg.Syscalls[i]
		d.num(uint64(len(c.Names)))
		for _, n := range c.Names {
			d.str(n)
		}
		d.str(string(c.Action))
		d.errno(c.ErrnoRet)
		d.num(uint64(len(c.Args)))
		for _, a := range c.Args {
			d.num(uint64(a.Index))
			d.num(a.Value)
			d.num(a.ValueTwo)
			d.str(string(a.Op))
		}
	}
	var k Key
	h.Sum(k[:0])
	return k
}

type digest struct {
	h   hash.Hash
	buf []byte
}

func (d *digest) num(v uint64) {
	d.buf = binary.LittleEndian.AppendUint64(d.buf[:0], v)
	d.h.Write(d.buf)
}

func (d *digest) str(s string) {
	d.num(uint64(len(s)))
	io.WriteString(d.h, s)
}

func (d *digest) errno(v *uint) {
	if v == nil {
		d.num(1 << 40)
		return
	}
	d.num(uint64(*v))
}

// Cache keeps the programs of the profiles used last, in memory. The zero
// value is not ready; safe for concurrent use.
type Cache struct {
	mu    sync.Mutex
	limit int
	order []Key // least recently used first
	kept  map[Key]*Program
}

// NewCache makes a cache of at most limit programs (some 8 KiB each).
func NewCache(limit int) *Cache {
	return &Cache{limit: max(limit, 1), kept: map[Key]*Program{}}
}

// Compile is the function Compile, remembered. The program must not be changed.
func (c *Cache) Compile(cfg *specs.LinuxSeccomp) (*Program, error) {
	if cfg == nil {
		return nil, nil
	}
	k := KeyOf(cfg)
	c.mu.Lock()
	p, ok := c.kept[k]
	if ok {
		i := slices.Index(c.order, k)
		c.order = append(slices.Delete(c.order, i, i+1), k)
	}
	c.mu.Unlock()
	if ok {
		return p, nil
	}
	p, err := Compile(cfg)
	if err != nil || p == nil {
		return p, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, twice := c.kept[k]; !twice {
		if len(c.order) >= c.limit {
			delete(c.kept, c.order[0])
			c.order = c.order[1:]
		}
		c.kept[k], c.order = p, append(c.order, k)
	}
	return p, nil
}
