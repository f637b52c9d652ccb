package osinit

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// show keeps the status on the screen, if there is one, and writes it to the
// console whenever the machine's state changes.
func (m *machine) show(ctx context.Context) {
	var vt *os.File
	if f, err := os.OpenFile("/dev/tty1", os.O_WRONLY|unix.O_NOCTTY, 0); err == nil {
		vt = f
		defer vt.Close()
	}
	last, state := "", ""
	for {
		changed := m.Changed()
		text := m.screen()
		m.mu.Lock()
		now := m.state
		m.mu.Unlock()
		if vt != nil && text != last && now != vmwire.StateStarting {
			fmt.Fprintf(vt, "\x1b[H\x1b[2J%s", text)
			last = text
		}
		if now != state && (now == vmwire.StateReady || now == vmwire.StateSafe) {
			m.log.mu.Lock()
			if m.log.console != nil {
				fmt.Fprintf(m.log.console, "\n%s\n", text)
			}
			m.log.mu.Unlock()
		}
		state = now
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		select { // several changes come together
		case <-ctx.Done():
			return
		case <-time.After(300 * time.Millisecond):
		}
	}
}
