package volarchive

import (
	"io"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Whole passes a tar on and remembers its last block: a tar ends in blocks of zeros,
// and one without them was cut off, or is none.
type Whole struct {
	src  io.Reader
	last [512]byte
	n    int64
}

// NewWhole reads from src.
func NewWhole(src io.Reader) *Whole { return &Whole{src: src} }

func (w *Whole) Read(p []byte) (int, error) {
	n, err := w.src.Read(p)
	w.n += int64(n)
	if got := p[:n]; n >= len(w.last) {
		copy(w.last[:], got[n-len(w.last):])
	} else {
		copy(w.last[:], w.last[n:])
		copy(w.last[len(w.last)-n:], got)
	}
	return n, err
}

// Check says whether what was read, to the end that a reader of tars sees, was whole.
func (w *Whole) Check() error {
	if w.n >= int64(len(w.last)) && w.last == [512]byte{} {
		return nil
	}
	return fault.New(fault.Invalid, "cannot import: the archive has no end: it is empty or was cut off")
}
