package seccomp

import (
	"crypto/sha256"
	"encoding/binary"
	"runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Key identifies a compiled profile. Rules that depend on capabilities or on the
// kernel have been decided when a profile is of the runtime spec's kind, so its
// content, the architecture and the compiler's version are all there is to it.
type Key [sha256.Size]byte

// compilerVersion changes with what Compile makes of a profile, the table of
// system calls included.
const compilerVersion = 1

// KeyOf digests everything that the filter depends on.
func KeyOf(cfg *specs.LinuxSeccomp) Key {
	d := digest{make([]byte, 0, 16<<10)}
	d.num(compilerVersion)
	d.str(runtime.GOARCH)
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
	return sha256.Sum256(d.b)
}

// digest gathers one unambiguous string to be hashed at once.
type digest struct{ b []byte }

func (d *digest) num(v uint64) { d.b = binary.LittleEndian.AppendUint64(d.b, v) }

func (d *digest) str(s string) {
	d.b = append(binary.LittleEndian.AppendUint32(d.b, uint32(len(s))), s...)
}

func (d *digest) errno(v *uint) {
	if v == nil {
		d.num(1 << 40)
		return
	}
	d.num(uint64(*v))
}
