package compose

import (
	"context"
	"fmt"
	"sync"

	"github.com/cloudos-io/cloudos/internal/cli/terminal"
	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// keyboard is what can be typed while an up is attached.
type keyboard struct {
	// detach is closed when d was typed.
	detach  chan struct{}
	once    sync.Once
	restore func()
}

// keys listens to the keyboard, where there is one and it is wanted; watch is what
// w begins, nil for nothing.
func (a *app) keys(ctx context.Context, wanted *bool, watch func(context.Context)) *keyboard {
	k := &keyboard{detach: make(chan struct{}), restore: func() {}}
	on := wanted == nil || *wanted
	if v := a.getenv("COMPOSE_MENU"); wanted == nil && v != "" {
		on = model.Truth(v)
	}
	if !on || !terminal.Is(a.Stdin) || !terminal.Is(a.Stdout) || a.ansiMode() == "never" {
		return k
	}
	restore, err := singleKeys(a.Stdin)
	if err != nil {
		return k // no keys, then
	}
	k.restore = restore
	hint := "press d to detach"
	if watch != nil {
		hint += ", w to watch files"
	}
	fmt.Fprintf(a.Stderr, "servin: %s, Ctrl-C to stop\n", hint)
	go func() { // a read of a terminal cannot be broken off: it ends with the program
		var b [1]byte
		for {
			if _, err := a.Stdin.Read(b[:]); err != nil || ctx.Err() != nil {
				return
			}
			switch b[0] {
			case 'd':
				k.once.Do(func() { close(k.detach) })
			case 'w':
				if watch != nil {
					watch(ctx)
					watch = nil
				}
			}
		}
	}()
	return k
}

// close puts the terminal back.
func (k *keyboard) close() { k.restore() }
