package seccomp

import (
	"cmp"
	"maps"
	"slices"

	"github.com/cloudos-io/cloudos/internal/fault"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

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

// program decides by architecture, then number, then arguments.
func (c *compiler) program(archs []arch) ([]byte, error) {
	groups := map[uint32][]arch{}
	var order []uint32
	for _, a := range archs {
		if groups[a.audit] == nil {
			order = append(order, a.audit)
		}
		groups[a.audit] = append(groups[a.audit], a)
	}
	asm := &assembler{rets: map[uint32]place{}}
	next := asm.ret(retKillThread) // any other architecture
	for _, audit := range slices.Backward(order) {
		entry := asm.load(offNumber, c.numbers(asm, groups[audit]))
		next = asm.branch(opJeq, audit, entry, next)
	}
	asm.load(offArch, next)
	if len(asm.rev) > unix.BPF_MAXINSNS {
		return nil, fault.New(fault.Invalid, "cannot compile seccomp profile: it needs %d instructions (limit %d)", len(asm.rev), unix.BPF_MAXINSNS)
	}
	return asm.encode(), nil
}

// numbers decides by the call's number, x32's numbers lying above the others.
func (c *compiler) numbers(asm *assembler, group []arch) place {
	native, hasX32 := group[0], false
	all := c.spans(native, 0)
	for _, a := range group[1:] {
		if a.x32 {
			hasX32 = true
			all = append(all, c.spans(a, x32Bit)...)
		}
	}
	if native.oci == specs.ArchX86_64 && !hasX32 {
		// Not an architecture of the profile; -1 is no number of it but a
		// tracer's way of skipping a call.
		beyond := all[len(all)-1].leaf
		all = append(all, span{x32Bit, leaf{act: retKillThread}})
		if beyond.plain() && beyond.act == retErrno|uint32(unix.ENOSYS) {
			all = append(all, span{2 * x32Bit, beyond}, span{3 * x32Bit, leaf{act: retKillThread}})
		}
		all = append(all, span{0xffffffff, leaf{act: c.def}})
	}
	return tree(asm, all, native.wide)
}

// tree bisects the spans. Every path ends in a return.
func tree(asm *assembler, all []span, wide bool) place {
	if len(all) == 1 {
		return all[0].leaf.assemble(asm, wide && all[0].from < x32Bit)
	}
	mid := len(all) / 2
	right := tree(asm, all[mid:], wide)
	left := tree(asm, all[:mid], wide)
	return asm.branch(opJge, all[mid].from, right, left)
}

func (l leaf) assemble(asm *assembler, wide bool) place {
	next := asm.ret(l.act)
	for _, m := range slices.Backward(l.matches) {
		yes := asm.ret(m.act)
		for _, x := range slices.Backward(m.conds) {
			yes = x.assemble(asm, yes, next, wide)
		}
		next = yes
	}
	return next
}

// assemble compares one argument. 64 bits are compared by halves, the high one
// first.
func (x condition) assemble(asm *assembler, yes, no place, wide bool) place {
	lo := uint32(offArgs + 8*x.index)
	hi := lo + 4
	vh, vl := uint32(x.value>>32), uint32(x.value)
	// what the low half decides, and the high half if it does not leave it to the low
	code, k := uint16(opJeq), vl
	below, above := no, no
	switch x.op {
	case specs.OpNotEqual:
		yes, no = no, yes
		below, above = no, no
	case specs.OpGreaterThan:
		code, above = opJgt, yes
	case specs.OpGreaterEqual:
		code, above = opJge, yes
	case specs.OpLessThan:
		code, below = opJge, yes
		yes, no = no, yes
	case specs.OpLessEqual:
		code, below = opJgt, yes
		yes, no = no, yes
	case specs.OpMaskedEqual:
		// value is the mask, valueTwo what is to be left
		k = uint32(x.two) & vl
	}
	p := asm.branch(code, k, yes, no)
	if x.op == specs.OpMaskedEqual {
		p = asm.and(vl, p)
	}
	p = asm.load(lo, p)
	if !wide {
		return p
	}
	switch {
	case x.op == specs.OpMaskedEqual && vh == 0:
		return p
	case x.op == specs.OpMaskedEqual:
		p = asm.branch(opJeq, uint32(x.two>>32)&vh, p, no)
		return asm.load(hi, asm.and(vh, p))
	case below == above:
		p = asm.branch(opJeq, vh, p, below)
	default:
		p = asm.branch(opJgt, vh, above, asm.branch(opJeq, vh, p, below))
	}
	return asm.load(hi, p)
}
