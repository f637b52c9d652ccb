package seccomp

import (
	"cmp"
	"encoding/binary"
	"maps"
	"slices"

	"github.com/cloudos-io/cloudos/internal/fault"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// insn is struct sock_filter.
type insn struct {
	code   uint16
	jt, jf uint8
	k      uint32
}

const (
	opLoad = 0x20 // ld [k]
	opAnd  = 0x54 // and #k
	opJump = 0x05 // ja
	opJeq  = 0x15
	opJgt  = 0x25
	opJge  = 0x35
	opRet  = 0x06

	offNumber = 0
	offArch   = 4
	offArgs   = 16
)

func encode(p []insn) []byte {
	out := make([]byte, 0, len(p)*8)
	for _, i := range p {
		out = binary.LittleEndian.AppendUint16(out, i.code)
		out = append(out, i.jt, i.jf)
		out = binary.LittleEndian.AppendUint32(out, i.k)
	}
	return out
}

// rule is what the profile says of one call by name.
type rule struct {
	name  string
	act   uint32
	conds [][]condition // alternatives; nil: always
}

// leaf is what is done with one call: the first match counts, else the default.
type leaf struct {
	act     uint32 // where no match is listed, or none applies
	matches []match
}

type match struct {
	conds []condition
	act   uint32
}

func (l leaf) plain() bool { return len(l.matches) == 0 }

type compiler struct {
	table     *table
	def       uint32
	rules     []rule
	mentioned []string // every name in the profile, whatever its action
}

// leaves collects the rules by number for one architecture.
func (c *compiler) leaves(a arch) map[uint32]leaf {
	out := map[uint32]leaf{}
	settled := map[uint32]bool{} // by a rule without conditions
	add := func(nr, act uint32, alternatives [][]condition) {
		if settled[nr] {
			return
		}
		if len(alternatives) == 0 {
			settled[nr] = true
			out[nr] = leaf{act: act}
			return
		}
		l, ok := out[nr]
		if !ok {
			l.act = c.def
		}
		for _, conds := range alternatives {
			l.matches = append(l.matches, match{conds, act})
		}
		out[nr] = l
	}
	for _, r := range c.rules {
		if nr, ok := c.table.number(r.name, a); ok {
			add(nr, r.act, r.conds)
		}
		if !a.mux {
			continue
		}
		if call, sub, ok := multiplexed(r.name); ok {
			// The arguments proper lie in memory, where a filter cannot look; the
			// first one tells which call is meant.
			alternatives := [][]condition{{}}
			if len(r.conds) > 0 {
				alternatives = r.conds
			}
			var with [][]condition
			for _, conds := range alternatives {
				list := []condition{{index: 0, op: specs.OpEqualTo, value: uint64(sub)}}
				for _, x := range conds {
					if x.index != 0 {
						list = append(list, x)
					}
				}
				with = append(with, list)
			}
			add(call, r.act, with)
		}
	}
	for nr, l := range out {
		l.matches = ordered(l.matches, a.wide)
		out[nr] = l
	}
	return out
}

// ordered settles which of several matching rules with different actions
// counts, as libseccomp's tree of conditions does: by argument, then operator,
// the narrower ones first, then the later in the profile.
func ordered(list []match, wide bool) []match {
	if !slices.ContainsFunc(list, func(m match) bool { return m.act != list[0].act }) {
		return list
	}
	rank := func(x condition) int {
		switch x.op {
		case specs.OpEqualTo, specs.OpNotEqual:
			return 4
		case specs.OpGreaterEqual, specs.OpLessThan:
			return 5
		case specs.OpGreaterThan, specs.OpLessEqual:
			return 6
		}
		if wide && x.value>>32 == 0 {
			return 0 // its first comparison is already of the low half
		}
		return 7
	}
	list = slices.Clone(list)
	slices.Reverse(list)
	slices.SortStableFunc(list, func(x, y match) int {
		for i := range min(len(x.conds), len(y.conds)) {
			a, b := x.conds[i], y.conds[i]
			if d := cmp.Or(cmp.Compare(b.index, a.index), cmp.Compare(rank(a), rank(b))); d != 0 {
				return d
			}
			if a != b {
				return 0
			}
		}
		return cmp.Compare(len(y.conds), len(x.conds))
	})
	return list
}

// newest is the largest number that the profile mentions: calls beyond it were
// unknown to its author and are answered with ENOSYS, so that programs fall
// back to older ones.
func (c *compiler) newest(a arch) uint32 {
	var n uint32
	for _, name := range c.mentioned {
		if a.mux {
			if _, _, ok := multiplexed(name); ok {
				continue
			}
		}
		if nr, ok := c.table.number(name, a); ok {
			n = max(n, nr)
		}
	}
	return n
}

// span is a range of numbers that end in the same leaf.
type span struct {
	from uint32
	leaf leaf
}

// spans covers all numbers from first on, in order, neighbours merged.
func (c *compiler) spans(a arch, first uint32) []span {
	leaves := c.leaves(a)
	out := []span{{first, leaf{act: c.def}}}
	put := func(from uint32, l leaf) {
		last := &out[len(out)-1]
		switch {
		case l.plain() && last.leaf.plain() && l.act == last.leaf.act:
		case last.from == from:
			last.leaf = l
			if n := len(out); n > 1 && l.plain() && out[n-2].leaf.plain() && out[n-2].leaf.act == l.act {
				out = out[:n-1]
			}
		default:
			out = append(out, span{from, l})
		}
	}
	top := c.newest(a)
	bounded := top != 0 && !permissive(c.def)
	for _, nr := range slices.Sorted(maps.Keys(leaves)) {
		// Only x86's own numbers of multiplexed calls can lie above top.
		if !bounded || nr <= top {
			put(nr, leaves[nr])
			put(nr+1, leaf{act: c.def})
		}
	}
	if bounded {
		put(top+1, leaf{act: retErrno | uint32(unix.ENOSYS)})
	}
	return out
}

func permissive(act uint32) bool {
	switch act & 0x7fff0000 {
	case retAllow, retLog, retTrace:
		return true
	}
	return false
}

// program lays out: architecture, then number, then arguments.
func (c *compiler) program(archs []arch) ([]insn, error) {
	groups := map[uint32][]arch{}
	var order []uint32
	for _, a := range archs {
		if groups[a.audit] == nil {
			order = append(order, a.audit)
		}
		groups[a.audit] = append(groups[a.audit], a)
	}
	out := []insn{{code: opLoad, k: offArch}}
	for _, audit := range order {
		body := append([]insn{{code: opLoad, k: offNumber}}, c.numbers(groups[audit])...)
		if len(body) <= 255 {
			out = append(out, insn{code: opJeq, jf: uint8(len(body)), k: audit})
		} else {
			out = append(out, insn{code: opJeq, jt: 1, k: audit}, insn{code: opJump, k: uint32(len(body))})
		}
		out = append(out, body...)
	}
	out = append(out, insn{code: opRet, k: retKillThread}) // any other architecture
	if len(out) > unix.BPF_MAXINSNS {
		return nil, fault.New(fault.Invalid, "cannot compile seccomp profile: it needs %d instructions (limit %d)", len(out), unix.BPF_MAXINSNS)
	}
	return out, nil
}

// numbers decides by the call's number, x32's numbers lying above the others.
func (c *compiler) numbers(group []arch) []insn {
	var all []span
	native, hasX32, amd64 := group[0], false, group[0].oci == specs.ArchX86_64
	all = c.spans(native, 0)
	for _, a := range group[1:] {
		if a.x32 {
			hasX32 = true
			all = append(all, c.spans(a, x32Bit)...)
		}
	}
	if amd64 && !hasX32 {
		// Not an architecture of the profile; -1 is no number of it but a
		// tracer's way of skipping a call.
		beyond := all[len(all)-1].leaf
		all = append(all, span{x32Bit, leaf{act: retKillThread}})
		if beyond.plain() && beyond.act == retErrno|uint32(unix.ENOSYS) {
			all = append(all, span{2 * x32Bit, beyond}, span{3 * x32Bit, leaf{act: retKillThread}})
		}
		all = append(all, span{0xffffffff, leaf{act: c.def}})
	}
	return c.tree(all, native.wide)
}

// tree bisects the spans. Every path ends in a return.
func (c *compiler) tree(all []span, wide bool) []insn {
	if len(all) == 1 {
		return c.code(all[0].leaf, wide && all[0].from < x32Bit)
	}
	mid := len(all) / 2
	left, right := c.tree(all[:mid], wide), c.tree(all[mid:], wide)
	var out []insn
	if len(left) <= 255 {
		out = append(out, insn{code: opJge, jt: uint8(len(left)), k: all[mid].from})
	} else {
		out = append(out, insn{code: opJge, jf: 1, k: all[mid].from}, insn{code: opJump, k: uint32(len(left))})
	}
	return append(append(out, left...), right...)
}

func (c *compiler) code(l leaf, wide bool) []insn {
	var out []insn
	for _, m := range l.matches {
		out = append(out, m.code(wide)...)
	}
	return append(out, insn{code: opRet, k: l.act})
}

// Jumps are written against these marks and resolved once lengths are known.
const (
	toNext = 0xff // to the next condition
	toFail = 0xfe // to the next match
)

func (m match) code(wide bool) []insn {
	var out []insn
	for _, x := range m.conds {
		out = append(out, x.code(wide)...)
	}
	return resolveFail(append(out, insn{code: opRet, k: m.act}))
}

func resolveFail(p []insn) []insn {
	for i := range p {
		rest := uint8(len(p) - i - 1)
		if p[i].code&7 == 5 && p[i].code != opJump {
			if p[i].jt == toFail {
				p[i].jt = rest
			}
			if p[i].jf == toFail {
				p[i].jf = rest
			}
		}
	}
	return p
}

// code compares one argument. 64 bits are compared by halves, the high one first.
func (x condition) code(wide bool) []insn {
	lo := uint32(offArgs + 8*x.index)
	hi := lo + 4
	ld := func(off uint32) insn { return insn{code: opLoad, k: off} }
	j := func(code uint16, k uint32, jt, jf uint8) insn { return insn{code: code, jt: jt, jf: jf, k: k} }
	vh, vl := uint32(x.value>>32), uint32(x.value)
	var p []insn
	switch x.op {
	case specs.OpEqualTo:
		if wide {
			p = append(p, ld(hi), j(opJeq, vh, 0, toFail))
		}
		p = append(p, ld(lo), j(opJeq, vl, 0, toFail))
	case specs.OpNotEqual:
		if wide {
			p = append(p, ld(hi), j(opJeq, vh, 0, toNext))
		}
		p = append(p, ld(lo), j(opJeq, vl, toFail, 0))
	case specs.OpMaskedEqual:
		// value is the mask, valueTwo what is to be left
		th, tl := uint32(x.two>>32)&vh, uint32(x.two)&vl
		if wide {
			p = append(p, ld(hi), insn{code: opAnd, k: vh}, j(opJeq, th, 0, toFail))
		}
		p = append(p, ld(lo), insn{code: opAnd, k: vl}, j(opJeq, tl, 0, toFail))
	case specs.OpGreaterThan, specs.OpGreaterEqual:
		if wide {
			p = append(p, ld(hi), j(opJgt, vh, toNext, 0), j(opJeq, vh, 0, toFail))
		}
		op := uint16(opJgt)
		if x.op == specs.OpGreaterEqual {
			op = opJge
		}
		p = append(p, ld(lo), j(op, vl, 0, toFail))
	case specs.OpLessThan, specs.OpLessEqual:
		if wide {
			p = append(p, ld(hi), j(opJgt, vh, toFail, 0), j(opJeq, vh, 0, toNext))
		}
		op := uint16(opJge)
		if x.op == specs.OpLessEqual {
			op = opJgt
		}
		p = append(p, ld(lo), j(op, vl, toFail, 0))
	}
	for i := range p {
		rest := uint8(len(p) - i - 1)
		if p[i].code&7 == 5 {
			if p[i].jt == toNext {
				p[i].jt = rest
			}
			if p[i].jf == toNext {
				p[i].jf = rest
			}
		}
	}
	return p
}
