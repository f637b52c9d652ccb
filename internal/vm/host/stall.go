package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// A kernel under an emulator sometimes stands still while it boots: its processors
// wait for one another, and nothing ends that. So a start is watched. Signs of life are
// bytes from the machine's port, where a guest that is alive says something at least
// every ten seconds (meet), and output on its console. Output alone is believed
// for half of the patience only: a kernel that stands still complains of it there.
//
// A machine that gave none for long enough is ended and started once more: to its data
// that is a power cut, in a start of which no engine has answered. The second start
// has all the time that is left: a computer on which this takes so long gets there, too.

// stall is a start that gave no sign of life.
type stall struct{ silent time.Duration }

func (s *stall) Error() string {
	return fmt.Sprintf("the machine gave no sign of life for %v", s.silent.Round(time.Second))
}

// silence is how long this computer's machine may give none: a multiple of what its
// last start took in all. The caller holds h.mu.
func (h *Host) silence() time.Duration {
	most := h.cfg.BootPatience / 2 // the second start needs time, too
	if h.took <= 0 {
		return min(2*h.cfg.Silence, most) // nothing is known of this computer
	}
	if h.took > most.Seconds() {
		return most
	}
	return min(max(time.Duration(5*h.took*float64(time.Second)), h.cfg.Silence), most)
}

// life notes signs of life, as times since begin.
type life struct {
	begin    time.Time
	last     atomic.Int64
	answered atomic.Bool // bytes came from the port
}

func (l *life) sign() { l.last.Store(int64(time.Since(l.begin))) }

// silent says how long there was no sign that is believed.
func (l *life) silent(silence, most time.Duration) (time.Duration, bool) {
	now := time.Since(l.begin)
	if d := now - time.Duration(l.last.Load()); d >= silence {
		return d, true
	}
	return now, !l.answered.Load() && now >= most
}

// heard is the port of a machine whose signs of life are noted.
type heard struct {
	net.Conn
	life *life
}

func (c heard) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.life.answered.Store(true)
		c.life.sign()
	}
	return n, err
}

// meetAlive meets the guest of a machine that was started just now. With a silence,
// it gives up as soon as that has passed without a sign of life.
func (h *Host) meetAlive(ctx context.Context, l *live, silence time.Duration) (vmwire.Status, error) {
	if silence == 0 {
		return h.meet(ctx, l)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		tick := time.NewTicker(min(silence/10, time.Second))
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if d, still := l.life.silent(silence, h.cfg.BootPatience/2); still {
				cancel(&stall{d})
				return
			}
		}
	}()
	st, err := h.meet(ctx, l)
	var s *stall
	if err != nil && errors.As(context.Cause(ctx), &s) {
		err = s
	}
	cancel(nil)
	<-watched
	return st, err
}
