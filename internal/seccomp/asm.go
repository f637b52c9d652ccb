package seccomp

import "encoding/binary"

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

// place is where an instruction stands, counted from the end of the program.
type place int

// assembler writes a program from its end to its beginning, so that every jump
// leads to what is there already. Returns are shared as far as a conditional
// jump reaches (255 instructions).
type assembler struct {
	rev  []insn
	rets map[uint32]place
}

func (a *assembler) push(i insn) place {
	a.rev = append(a.rev, i)
	return place(len(a.rev) - 1)
}

// skip is the distance that the next instruction's jump to p would have.
func (a *assembler) skip(p place) int { return len(a.rev) - int(p) - 1 }

func (a *assembler) ret(act uint32) place {
	p, ok := a.rets[act]
	// leave room for what may be written before the jump to it is
	if !ok || a.skip(p) > 240 {
		p = a.push(insn{code: opRet, k: act})
		a.rets[act] = p
	}
	return p
}

// near gives a place with the effect of p that stays in reach of a jump written
// within the next few instructions.
func (a *assembler) near(p place) place {
	if a.skip(p) <= 250 {
		return p
	}
	if i := a.rev[p]; i.code == opRet {
		return a.ret(i.k)
	}
	return a.push(insn{code: opJump, k: uint32(a.skip(p))})
}

func (a *assembler) branch(code uint16, k uint32, yes, no place) place {
	yes, no = a.near(yes), a.near(no)
	return a.push(insn{code: code, jt: uint8(a.skip(yes)), jf: uint8(a.skip(no)), k: k})
}

// load reads a word and goes on to next, which is written right after it.
func (a *assembler) load(off uint32, next place) place {
	if a.skip(next) != 0 {
		a.push(insn{code: opJump, k: uint32(a.skip(next))})
	}
	return a.push(insn{code: opLoad, k: off})
}

func (a *assembler) and(mask uint32, next place) place {
	if a.skip(next) != 0 {
		a.push(insn{code: opJump, k: uint32(a.skip(next))})
	}
	return a.push(insn{code: opAnd, k: mask})
}

// encode gives the program in the order of execution.
func (a *assembler) encode() []byte {
	out := make([]byte, 0, len(a.rev)*8)
	for n := len(a.rev) - 1; n >= 0; n-- {
		i := a.rev[n]
		out = binary.LittleEndian.AppendUint16(out, i.code)
		out = append(out, i.jt, i.jf)
		out = binary.LittleEndian.AppendUint32(out, i.k)
	}
	return out
}
