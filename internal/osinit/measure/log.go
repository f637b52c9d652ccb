// Package measure tells beforehand what a start by Debian's boot loaders will be measured as, so that a
// key is sealed to a system before it was ever started. It reads the firmware's log of the start that this machine had,
// checks that it understands all that the boot loader measured there, and puts the other system into its place.
//
// Words: an event is one thing that was measured into a register; a start's registers are its events
// one after the other. GRUB measures each command that it carries out into register 8, each file that it reads into
// register 9, and has the firmware measure the kernel into register 4.
//
// The first process imports it. The log's format is of the TCG's "PC Client Platform Firmware Profile
// Specification", chapter 10.
package measure

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"strings"
)

// event is one measurement.
type event struct {
	pcr    int
	digest [sha256.Size]byte
	// text is what the event says, without the zero at its end.
	text string
}

const (
	noAction  = 3    // an event that is not measured
	algSHA256 = 0x0b // TPM_ALG_SHA256
	maxEvents = 4096
)

var errLog = errors.New("the firmware's log of the start cannot be read")

// reader takes numbers and bytes off a log; after its end it has none.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n uint32) []byte {
	if r.bad || uint64(n) > uint64(len(r.b)) {
		r.bad = true
		return nil
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) u16() uint16 {
	if b := r.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

// parse reads a log.
func parse(log []byte) ([]event, error) {
	r := &reader{b: log}
	// The first event has the old format, and says which digests the others have.
	r.take(4 + 4 + 20)
	head := &reader{b: r.take(r.u32())}
	if string(head.take(16)) != "Spec ID Event03\x00" {
		return nil, errLog
	}
	head.take(4 + 4)
	sizes := map[uint16]uint32{}
	for n := min(head.u32(), 16); n > 0; n-- {
		alg := head.u16()
		sizes[alg] = uint32(head.u16())
	}
	if head.bad || sizes[algSHA256] != sha256.Size {
		return nil, errLog
	}
	var out []event
	for len(r.b) > 0 {
		e := event{pcr: int(r.u32())}
		kind := r.u32()
		found := false
		for n := min(r.u32(), 16); n > 0; n-- {
			alg := r.u16()
			size, known := sizes[alg]
			digest := r.take(size)
			if !known || r.bad {
				return nil, errLog
			}
			if alg == algSHA256 {
				copy(e.digest[:], digest)
				found = true
			}
		}
		e.text = strings.TrimSuffix(string(r.take(r.u32())), "\x00")
		if r.bad || !found || len(out) == maxEvents {
			return nil, errLog
		}
		if kind != noAction {
			out = append(out, e)
		}
	}
	return out, nil
}

// register is what a register has after events.
func register(events []event, pcr int) []byte {
	sum := make([]byte, sha256.Size)
	for _, e := range events {
		if e.pcr == pcr {
			next := sha256.Sum256(append(sum[:len(sum):len(sum)], e.digest[:]...))
			sum = next[:]
		}
	}
	return sum
}
