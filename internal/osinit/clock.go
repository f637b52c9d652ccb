package osinit

import (
	"context"
	"time"

	"github.com/beevik/ntp"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/osinit/config"
)

// defaultServers stand where nobody names others.
var defaultServers = []string{"0.debian.pool.ntp.org", "1.debian.pool.ntp.org", "time.cloudflare.com"}

// step is how wrong the clock may be before it is set and not slowed or hastened.
const step = 128 * time.Millisecond

// keepTime asks time servers until ctx is done. A machine whose host sets the
// clock (over the port) asks nobody.
func (m *machine) keepTime(ctx context.Context, c config.Time) {
	if c.Off {
		return
	}
	select {
	case <-m.net.Online():
	case <-ctx.Done():
		return
	}
	wait := 2 * time.Second
	for {
		if m.hostKeepsTime() {
			return
		}
		servers := c.Servers
		if len(servers) == 0 {
			for _, a := range m.net.TimeServers() {
				servers = append(servers, a.String())
			}
			servers = append(servers, defaultServers...)
		}
		if offset, ok := ask(ctx, servers); ok {
			if err := adjust(offset); err != nil {
				m.problem(err)
				return
			}
			if offset.Abs() > step {
				m.log.Printf("the clock was %v off", -offset.Round(time.Millisecond))
			}
			m.mu.Lock()
			m.synced = true
			m.mu.Unlock()
			m.change()
			wait = 17 * time.Minute
		} else {
			wait = min(2*wait, 17*time.Minute)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// ask returns how far the clock is behind, from the first server with a good answer.
func ask(ctx context.Context, servers []string) (time.Duration, bool) {
	for _, s := range servers {
		if ctx.Err() != nil {
			return 0, false
		}
		r, err := ntp.QueryWithOptions(s, ntp.QueryOptions{Timeout: 2 * time.Second})
		if err == nil && r.Validate() == nil {
			return r.ClockOffset, true
		}
	}
	return 0, false
}

// adjust moves the clock, at once or slowly, and has the kernel copy it to the
// machine's own clock from time to time.
func adjust(offset time.Duration) error {
	if offset.Abs() > step {
		tv := unix.NsecToTimeval(time.Now().Add(offset).UnixNano())
		if err := unix.Settimeofday(&tv); err != nil {
			return err
		}
		offset = 0
	}
	const (
		adjOffset, adjStatus, adjEstError, adjMaxError, adjNano = 0x1, 0x10, 0x8, 0x4, 0x2000
		staPLL                                                  = 0x1
	)
	tx := unix.Timex{Modes: adjOffset | adjStatus | adjEstError | adjMaxError | adjNano, Status: staPLL}
	setOffset(&tx, offset)
	_, err := unix.Adjtimex(&tx)
	return err
}

func setOffset(tx *unix.Timex, d time.Duration) { tx.Offset = int64(d) }

func (m *machine) hostKeepsTime() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.hostClock
}
