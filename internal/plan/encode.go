package plan

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	magic   = "SVPL"
	version = 1

	// flagContinue: operations refer to the slots of the plan before.
	flagContinue = 1 << 0

	maxOps  = 16384
	maxPlan = 8 << 20
)

// enc builds a payload. The first value that does not fit is remembered and
// reported once, at the end.
type enc struct {
	b   []byte
	err error
}

func (e *enc) u16(v uint16) *enc { e.b = binary.LittleEndian.AppendUint16(e.b, v); return e }
func (e *enc) u32(v uint32) *enc { e.b = binary.LittleEndian.AppendUint32(e.b, v); return e }
func (e *enc) u64(v uint64) *enc { e.b = binary.LittleEndian.AppendUint64(e.b, v); return e }

func (e *enc) bad(format string, args ...any) {
	if e.err == nil {
		e.err = fault.New(fault.Invalid, format, args...)
	}
}

func (e *enc) str(s string) *enc {
	if len(s) > 0xffff || strings.IndexByte(s, 0) >= 0 {
		e.bad("string of %d bytes is too long or holds a NUL: %.32q", len(s), s)
		s = ""
	}
	e.u16(uint16(len(s)))
	e.b = append(append(e.b, s...), 0)
	return e
}

func (e *enc) long(s string) *enc {
	if len(s) > maxPlan || strings.IndexByte(s, 0) >= 0 {
		e.bad("string of %d bytes is too long or holds a NUL: %.32q", len(s), s)
		s = ""
	}
	e.u32(uint32(len(s)))
	e.b = append(append(e.b, s...), 0)
	return e
}

func (e *enc) bytes(p []byte) *enc {
	e.u32(uint32(len(p)))
	e.b = append(e.b, p...)
	return e
}

func (e *enc) count(n int) *enc {
	if n > 0xffff {
		e.bad("%d entries are too many (limit 65535)", n)
		n = 0
	}
	return e.u16(uint16(n))
}

func (e *enc) longs(l []string) *enc {
	e.count(len(l))
	for _, s := range l {
		e.long(s)
	}
	return e
}

func (e *enc) strs(l []string) *enc {
	e.count(len(l))
	for _, s := range l {
		e.str(s)
	}
	return e
}

// Encode gives the wire form that the start-up stage reads.
func (p *Plan) Encode() ([]byte, error) {
	if len(p.Ops) > maxOps {
		return nil, fault.New(fault.Invalid, "plan of %d operations is too long (limit %d)", len(p.Ops), maxOps)
	}
	n := 12
	for _, op := range p.Ops {
		n += 8 + 3 + len(op.Name) + len(op.Payload)
	}
	if n > maxPlan {
		return nil, fault.New(fault.Invalid, "plan of %d bytes is too large (limit %d)", n, maxPlan)
	}
	e := &enc{b: make([]byte, 0, n)}
	e.b = append(e.b, magic...)
	var flags uint16
	if p.Continues {
		flags |= flagContinue
	}
	e.u16(version).u16(flags).u32(uint32(len(p.Ops)))
	for _, op := range p.Ops {
		name := op.Name
		if len(name) > 200 {
			name = name[:200]
		}
		e.u16(uint16(op.Kind)).u16(op.Flags).u32(uint32(3 + len(name) + len(op.Payload)))
		e.str(name)
		e.b = append(e.b, op.Payload...)
	}
	return e.b, e.err
}

// dec reads what enc wrote, strictly.
type dec struct {
	b   []byte
	err error
}

func (d *dec) take(n int) []byte {
	if d.err != nil || n < 0 || n > len(d.b) {
		if d.err == nil {
			d.err = fault.New(fault.Invalid, "cannot decode plan: truncated")
		}
		return make([]byte, 8)[:min(max(n, 0), 8)]
	}
	v := d.b[:n]
	d.b = d.b[n:]
	return v
}

func (d *dec) u16() uint16 { return binary.LittleEndian.Uint16(d.take(2)) }
func (d *dec) u32() uint32 { return binary.LittleEndian.Uint32(d.take(4)) }
func (d *dec) u64() uint64 { return binary.LittleEndian.Uint64(d.take(8)) }

func (d *dec) text(n int) string {
	s := d.take(n)
	if nul := d.take(1); d.err == nil && (nul[0] != 0 || bytes.IndexByte(s, 0) >= 0) {
		d.err = fault.New(fault.Invalid, "cannot decode plan: a string is not terminated where it says")
	}
	return string(s)
}

// value renders one field of the type, for goldens, and checks its bounds.
func (d *dec) value(typ string) string {
	switch typ {
	case "h":
		if v := d.u16(); v == NoSlot {
			return "-"
		} else {
			return strconv.Itoa(int(v))
		}
	case "i":
		return strconv.FormatInt(int64(int32(d.u32())), 10)
	case "q":
		return "0x" + strconv.FormatUint(d.u64(), 16)
	case "s":
		return strconv.Quote(d.text(int(d.u16())))
	case "S":
		return strconv.Quote(d.text(int(d.u32())))
	case "b":
		b := d.take(int(d.u32()))
		if len(b) > 64 {
			return fmt.Sprintf("(%d bytes)", len(b))
		}
		return strconv.Quote(string(b))
	}
	n := int(d.u16())
	inner := strings.Trim(typ, "[]")
	out := make([]string, 0, min(n, 64))
	for i := 0; i < n && d.err == nil; i++ {
		var t []string
		for _, c := range inner {
			t = append(t, d.value(string(c)))
		}
		out = append(out, strings.Join(t, ":"))
	}
	return "[" + strings.Join(out, " ") + "]"
}

// render decodes a payload by its layout.
func (op Op) render() (string, error) {
	for _, l := range layouts() {
		if l.kind != op.Kind {
			continue
		}
		d := &dec{b: op.Payload}
		var sb strings.Builder
		sb.WriteString(l.name)
		names, types := l.split()
		for i, t := range types {
			fmt.Fprintf(&sb, " %s=%s", names[i], d.value(t))
		}
		if op.Flags != 0 {
			fmt.Fprintf(&sb, " flags=%#x", op.Flags)
		}
		if d.err == nil && len(d.b) != 0 {
			d.err = fault.New(fault.Invalid, "cannot decode plan: %d stray bytes in %s", len(d.b), l.name)
		}
		return sb.String(), d.err
	}
	return "", fault.New(fault.Invalid, "cannot decode plan: unknown operation %d", op.Kind)
}

// String renders the operation in one line.
func (op Op) String() string {
	s, err := op.render()
	if err != nil {
		return fmt.Sprintf("%s: %v", op.Kind, err)
	}
	return s
}

// Decode reads a wire form; anything that does not follow the layouts exactly
// is refused.
func Decode(b []byte) (*Plan, error) {
	d := &dec{b: b}
	if string(d.take(4)) != magic {
		return nil, fault.New(fault.Invalid, "cannot decode plan: no plan")
	}
	if v := d.u16(); d.err == nil && v != version {
		return nil, fault.New(fault.Unsupported, "cannot decode plan: version %d", v)
	}
	flags := d.u16()
	if flags&^flagContinue != 0 {
		return nil, fault.New(fault.Invalid, "cannot decode plan: unknown flags %#x", flags)
	}
	n := d.u32()
	if d.err != nil || n > maxOps {
		return nil, fault.New(fault.Invalid, "cannot decode plan: truncated or too long")
	}
	p := &Plan{Continues: flags&flagContinue != 0}
	for range n {
		op := Op{Kind: Kind(d.u16()), Flags: d.u16()}
		in := &dec{b: d.take(int(d.u32()))}
		if d.err != nil {
			return nil, d.err
		}
		op.Name = in.text(int(in.u16()))
		if in.err != nil {
			return nil, in.err
		}
		op.Payload = bytes.Clone(in.b)
		if _, err := op.render(); err != nil {
			return nil, err
		}
		p.Ops = append(p.Ops, op)
	}
	if len(d.b) != 0 {
		return nil, fault.New(fault.Invalid, "cannot decode plan: %d bytes after its end", len(d.b))
	}
	return p, nil
}
