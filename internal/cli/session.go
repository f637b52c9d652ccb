package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

// session joins our standard streams with those of a container or exec.
type session struct {
	app    *App
	stream *client.Stream
	tty    bool
	stdin  bool
	// resize tells the other side the terminal's size; nil for none.
	resize func(ctx context.Context, width, height uint16) error
	// resizeNow sends the size at once, for a terminal that was made before its
	// size was known.
	resizeNow bool
}

// run copies until output ends: out is called with where output goes.
func (s *session) run(ctx context.Context, out func(stdout, stderr io.Writer) error) error {
	a := s.app
	raw := s.tty && s.stdin && terminal.Is(a.Stdin)
	if raw {
		restore, err := terminal.Raw(a.Stdin, a.stdoutFile())
		if err != nil {
			return fmt.Errorf("cannot set the terminal up: %w", err)
		}
		defer restore()
		defer restoreOnDeath(restore)()
	}
	if s.tty && s.resize != nil && a.outIsTerminal() {
		ctx, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		wg.Add(1)
		go func() { defer wg.Done(); s.watchSize(ctx) }()
		defer wg.Wait()
		defer cancel()
	}
	if s.stdin {
		go func() {
			// Nothing waits for this: a read of a terminal cannot be broken off.
			io.Copy(s.stream, a.Stdin)
			s.stream.CloseWrite()
		}()
	}
	return out(a.Stdout, a.Stderr)
}

func (s *session) watchSize(ctx context.Context) {
	f := s.app.stdoutFile()
	c, stop := terminal.Resized(f)
	defer stop()
	send := func() bool {
		w, h := terminal.Size(f)
		return w > 0 && h > 0 && s.resize(ctx, uint16(w), uint16(h)) == nil
	}
	if s.resizeNow {
		// The process may not be quite there yet.
		for i := range 10 {
			if send() || ctx.Err() != nil {
				break
			}
			select {
			case <-time.After(time.Duration(10*(i+1)) * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}
	for {
		select {
		case <-c:
			send()
		case <-ctx.Done():
			return
		}
	}
}

// consoleSize is the size that a terminal of ours should begin with.
func (a *App) consoleSize() [2]uint {
	f := a.stdoutFile()
	if f == nil || !terminal.Is(f) {
		return [2]uint{}
	}
	w, h := terminal.Size(f)
	return [2]uint{uint(h), uint(w)}
}

// checkTTY refuses a terminal for the container when input is none: keys could
// not reach it as keys.
func (a *App) checkTTY(tty, stdin bool) error {
	if tty && stdin && !terminal.Is(a.Stdin) {
		return usagef("cannot give the container a terminal (-t): standard input is not one; leave -t out, or run it from a terminal")
	}
	return nil
}

// restoreOnDeath puts the terminal back before a signal ends us.
func restoreOnDeath(restore func()) (stop func()) {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, deathSignals()...)
	end := make(chan struct{})
	go func() {
		select {
		case s := <-sig:
			restore()
			os.Exit(128 + signalNumber(s))
		case <-end:
		}
	}()
	return func() { signal.Stop(sig); close(end) }
}

// patience is how many interrupts are passed on before the next one ends us.
const patience = 2

// proxySignals passes signals on to the container once ready is closed; before,
// the first interrupt is kept and a second ends us. The third interrupt gives up
// on a container that does not heed them.
func (a *App) proxySignals(ctx context.Context, ready <-chan struct{}, kill func(ctx context.Context, sig string) error, name func() string) (stop func()) {
	sig := make(chan os.Signal, 16)
	signal.Notify(sig, proxiedSignals()...)
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		interrupts := 0
		var early []os.Signal
		for waiting := true; waiting; {
			select {
			case s := <-sig:
				if early = append(early, s); len(early) > 1 {
					os.Exit(exitInterrupt)
				}
			case <-ready:
				waiting = false
			case <-end:
				return
			}
		}
		for _, s := range early {
			sig <- s
		}
		for {
			select {
			case s := <-sig:
				if s == os.Interrupt {
					interrupts++
				}
				if interrupts > patience {
					fmt.Fprintf(a.Stderr, "\nservin: left the container running: stop it with 'servin stop %s'\n", name())
					os.Exit(exitInterrupt)
				}
				kctx, cancel := context.WithTimeout(ctx, 5*time.Second)
				err := kill(kctx, signalName(s))
				cancel()
				if interrupts == patience {
					fmt.Fprintln(a.Stderr, "\nservin: the container has not stopped; press Ctrl-C once more to leave it running")
				}
				var ce *client.ConnectError
				if errors.As(err, &ce) && s == os.Interrupt {
					os.Exit(exitInterrupt)
				}
			case <-end:
				return
			}
		}
	}()
	return func() { signal.Stop(sig); close(end); wg.Wait() }
}

// interruptible gives a context that the first interrupt ends.
func interruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, os.Interrupt)
}
