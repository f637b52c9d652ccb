package dockerapi

import (
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// defaultDetachKeys is ctrl-p,ctrl-q.
var defaultDetachKeys = []byte{16, 17}

// parseDetachKeys reads a key sequence as the docker command line writes it:
// keys separated by commas, each one character or "ctrl-" and one of
// a-z @ [ \ ] ^ _. The empty string is the default sequence.
func parseDetachKeys(s string) ([]byte, error) {
	if s == "" {
		return defaultDetachKeys, nil
	}
	var keys []byte
	for _, k := range strings.Split(s, ",") {
		if len(k) == 1 {
			keys = append(keys, k[0])
			continue
		}
		c, ok := strings.CutPrefix(k, "ctrl-")
		switch {
		case ok && len(c) == 1 && c[0] >= 'a' && c[0] <= 'z':
			keys = append(keys, c[0]-'a'+1)
		case ok && len(c) == 1 && strings.IndexByte(`@[\]^_`, c[0]) >= 0:
			keys = append(keys, c[0]-'@')
		case k == "DEL":
			keys = append(keys, 127)
		default:
			return nil, badKeys(s)
		}
	}
	return keys, nil
}

func badKeys(s string) error {
	return fault.New(fault.Invalid, "Invalid detach keys (%s) provided: write keys separated by commas, each a character or ctrl- and one of a-z @ [ \\ ] ^ _", s)
}

// escaper looks for the detach keys in a client's input. Bytes that may be the
// beginning of the sequence are held back until it is clear that they are not.
type escaper struct {
	keys []byte
	held int // how many bytes of keys were seen
}

// filter returns what of p may pass on, using buf for its storage, and whether
// the sequence was completed; what follows it is dropped.
func (e *escaper) filter(buf, p []byte) (out []byte, detached bool) {
	out = buf[:0]
	for _, b := range p {
		for e.held > 0 && b != e.keys[e.held] {
			// Not the sequence after all: give back its first byte and see
			// whether what was held is the beginning of another try.
			out = e.giveBack(out)
		}
		if b == e.keys[e.held] {
			if e.held++; e.held == len(e.keys) {
				return out, true
			}
			continue
		}
		out = append(out, b)
	}
	return out, false
}

// giveBack releases held bytes from the front until the rest is again a
// beginning of the sequence.
func (e *escaper) giveBack(out []byte) []byte {
	held := e.keys[:e.held]
	for n := 1; n <= len(held); n++ {
		if string(held[n:]) == string(e.keys[:len(held)-n]) {
			e.held = len(held) - n
			return append(out, held[:n]...)
		}
	}
	return out
}

// rest is what is held at the end of the input.
func (e *escaper) rest() []byte { return e.keys[:e.held] }
