package fault

import (
	"context"
	"errors"
	"syscall"
	"time"
)

// ShortageFor is how long work that has to be done waits for descriptors.
const ShortageFor = 15 * time.Second

// Short reports whether err says that descriptors ran out: of the process, or of the
// host. Others give some back at any moment, so what failed may go through a moment later.
func Short(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// Outwait does what can be repeated, again and again while descriptors are short, for
// ShortageFor at most or until ctx is done. It is for what gives back and clears away,
// which nobody does later; what takes more (a start) fails at once and says why.
func Outwait(ctx context.Context, f func() error) error {
	err := f()
	if !Short(err) {
		return err
	}
	end := time.NewTimer(ShortageFor)
	defer end.Stop()
	for wait := 2 * time.Millisecond; Short(err); wait = min(2*wait, 100*time.Millisecond) {
		select {
		case <-ctx.Done():
			return err
		case <-end.C:
			return err
		case <-time.After(wait):
		}
		err = f()
	}
	return err
}
