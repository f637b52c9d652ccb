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

// life counts signs of life.
type life struct {
	signs    atomic.Uint64
	answered atomic.Bool // bytes came from the port
}

func (l *life) sign() { l.signs.Add(1) }

// patience measures a silence from one look to the next.
type patience struct {
	silence, most time.Duration
	signs         uint64        // at the last look
	silent, all   time.Duration // without a sign, and since the beginning
}

// over takes the time since the last look into account and says whether it is enough.
func (p *patience) over(l *life, passed time.Duration) bool {
	// Who looks was asleep, too, as computers are: the guest had no such chance.
	passed = min(passed, p.silence/4)
	p.silent, p.all = p.silent+passed, p.all+passed
	if n := l.signs.Load(); n != p.signs {
		p.signs, p.silent = n, 0
	}
	if !l.answered.Load() && p.all >= p.most {
		p.silent = p.all
	}
	return p.silent >= p.silence
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
		p := patience{silence: silence, most: h.cfg.BootPatience / 2}
		tick := time.NewTicker(min(silence/10, time.Second))
		defer tick.Stop()
		for last := time.Now(); ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			now := time.Now()
			if p.over(&l.life, now.Sub(last)) {
				cancel(&stall{p.silent})
				return
			}
			last = now
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
