package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/compose-spec/compose-go/v2/types"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/compose/display"
	"github.com/cloudos-io/cloudos/internal/compose/model"
	"github.com/cloudos-io/cloudos/internal/compose/plan"
)

// Cascade says what the end of one container means for the others.
type Cascade int

// Cascades.
const (
	Ignore Cascade = iota
	OnExit
	OnFailure
)

// AttachedOptions of Attached.
type AttachedOptions struct {
	Options
	// Services are the ones whose end is waited for, AttachTo those whose output
	// is shown.
	Services, AttachTo []string
	// Stop are the services that an interrupt or the cascade stops; none is all.
	Stop         []string
	Cascade      Cascade
	ExitCodeFrom string
	// Interrupts stops the project at the first signal and kills it at the second.
	Interrupts <-chan os.Signal
	Logs       *display.Logs
	// Out gets lines about what goes on.
	Out io.Writer
	// Progress makes the display for what comes after the containers have
	// started: the stop.
	Progress func(title string) display.Progress
	// Started runs once everything runs; watching begins there. Detach ends the
	// session and leaves everything running.
	Started func(ctx context.Context) error
	Detach  <-chan struct{}
}

// ErrInterrupted says that a signal ended the session.
var ErrInterrupted = errors.New("interrupted")

// Attached carries an up's plan out and stays with the containers until they have
// ended. It gives the exit code that the options ask for.
func (e *Engine) Attached(ctx context.Context, p *types.Project, pl *plan.Plan, ob plan.Observed, pr display.Progress, o AttachedOptions) (int, error) {
	s := &attached{e: e, p: p, o: o, pr: pr}
	s.f = &follower{e: e, project: p.Name, services: o.Services, since: client.Since(time.Now()), live: map[string]bool{}, seen: map[string]bool{}, patient: true, logs: o.Logs}
	s.f.onStart, s.f.onExit = s.started, s.exited
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	xctx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	var watch sync.WaitGroup
	watch.Add(1)
	go func() { defer watch.Done(); s.supervise(ctx, giveUp) }()
	followed := make(chan error, 1)
	// What is attached lives as long as the session, not as the plan.
	o.Options.OnBarrier = func(context.Context) error {
		if err := s.barrier(ctx); err != nil {
			return err
		}
		go func() { followed <- s.f.run(ctx) }()
		return nil
	}
	err := e.Execute(xctx, p, pl, ob, &muted{Progress: pr, s: s}, o.Options)
	pr.Close()
	if err != nil && !s.stopping() {
		cancel()
		watch.Wait()
		s.readers.Wait()
		return 0, err
	}
	var side sync.WaitGroup
	if o.Started != nil && err == nil {
		side.Add(1)
		go func() {
			defer side.Done()
			if err := o.Started(ctx); err != nil && ctx.Err() == nil {
				s.fail(err)
			}
		}()
	}
	s.f.settle()
	detached := false
	if s.isAttached() {
		select {
		case err = <-followed:
		case <-o.Detach:
			detached = true
		}
	}
	if !detached {
		s.ends.Wait()
		// What they wrote last is on its way.
		waitFor(&s.readers, 2*time.Second)
	}
	cancel()
	watch.Wait()
	side.Wait()
	s.readers.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	if s.err != nil {
		err = s.err
	}
	if s.interrupted && err == nil {
		err = ErrInterrupted
	}
	return s.code, err
}

func waitFor(wg *sync.WaitGroup, d time.Duration) {
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(d):
	}
}

// attached is one such session.
type attached struct {
	e       *Engine
	p       *types.Project
	o       AttachedOptions
	f       *follower
	pr      display.Progress
	readers sync.WaitGroup // copy output
	ends    sync.WaitGroup // stop or kill

	mu                    sync.Mutex
	attached, interrupted bool
	stop                  bool
	quiet                 bool
	code                  int
	coded                 bool
	err                   error
}

// muted hides the progress of starts: from then on containers speak.
type muted struct {
	display.Progress
	s *attached
}

func (m *muted) Event(ev display.Event) {
	m.s.mu.Lock()
	q := m.s.quiet
	m.s.mu.Unlock()
	if !q {
		m.Progress.Event(ev)
	}
}

func (s *attached) stopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stop
}

func (s *attached) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil && !errors.Is(err, context.Canceled) {
		s.err = err
	}
}

// barrier attaches to the containers, which are made and do not run yet.
func (s *attached) barrier(ctx context.Context) error {
	s.mu.Lock()
	s.quiet = true
	s.mu.Unlock()
	s.pr.Close()
	list, err := s.e.Containers(ctx, s.p.Name, true, WithoutOneOff)
	if err != nil {
		return err
	}
	shown := list[:0:0]
	for _, c := range list {
		svc := model.Service(&c)
		if s.f.wants(svc) {
			s.f.live[c.ID] = true
		}
		if slices.Contains(s.o.AttachTo, svc) {
			shown = append(shown, c)
		}
	}
	for i := range shown {
		s.o.Logs.Register(source(&shown[i]))
	}
	if len(shown) > 0 {
		fmt.Fprintf(s.o.Out, "Attaching to %s\n", names(shown))
	}
	for i := range shown {
		if err := s.e.attach(ctx, &shown[i], s.o.Logs, &s.readers); err != nil {
			return err
		}
		s.f.seen[shown[i].ID] = true
	}
	s.mu.Lock()
	s.attached = true
	s.mu.Unlock()
	return nil
}

func (s *attached) isAttached() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.attached
}

func (s *attached) started(ctx context.Context, h Happening) {
	if !slices.Contains(s.o.AttachTo, h.Service) {
		return
	}
	s.readers.Add(1)
	go func() {
		defer s.readers.Done()
		if err := s.e.logOne(ctx, h.ID, h.Source, s.o.Logs, LogOptions{Follow: true, Since: h.At}); err != nil && ctx.Err() == nil {
			s.fail(err)
		}
	}()
}

func (s *attached) exited(ctx context.Context, h Happening) {
	if h.Restarting {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.o.ExitCodeFrom != "" && h.Service == s.o.ExitCodeFrom && !s.coded {
		s.code, s.coded = h.ExitCode, true
	}
	if s.stop || s.o.Cascade == Ignore || s.o.Cascade == OnFailure && h.ExitCode == 0 {
		return
	}
	if s.o.ExitCodeFrom == "" {
		s.code = h.ExitCode
	}
	s.stop = true
	fmt.Fprintln(s.o.Out, "Aborting on container exit...")
	s.halt(ctx)
}

// halt stops the project off the side.
func (s *attached) halt(ctx context.Context) {
	s.ends.Add(1)
	go func() {
		defer s.ends.Done()
		ctx := context.WithoutCancel(ctx)
		ob, err := s.observe(ctx)
		if err == nil {
			var pl *plan.Plan
			if pl, err = plan.Stops(s.p, ob, s.o.Stop); err == nil {
				pr := s.o.Progress("Stopping")
				err = s.e.Execute(ctx, s.p, pl, ob, pr, s.o.Options)
				pr.Close()
			}
		}
		if err != nil {
			s.fail(err)
		}
	}()
}

func (s *attached) observe(ctx context.Context) (ob plan.Observed, err error) {
	ob.Containers, err = s.e.Containers(ctx, s.p.Name, true, WithoutOneOff)
	return ob, err
}

// supervise heeds signals: the first stops what runs, and what is still to be
// done is given up.
func (s *attached) supervise(ctx context.Context, giveUp func()) {
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-s.o.Interrupts:
		}
		s.mu.Lock()
		s.interrupted, s.stop = true, true
		begun := s.attached
		s.mu.Unlock()
		giveUp()
		if !begun {
			return
		}
		if n == 0 {
			fmt.Fprintln(s.o.Out, "Gracefully Stopping... press Ctrl+C again to force")
			s.f.settle()
			s.halt(ctx)
			continue
		}
		s.ends.Add(1)
		go func() {
			defer s.ends.Done()
			ctx := context.WithoutCancel(ctx)
			ob, err := s.observe(ctx)
			if err != nil {
				s.fail(err)
				return
			}
			for i := range ob.Containers {
				if len(s.o.Stop) > 0 && !slices.Contains(s.o.Stop, model.Service(&ob.Containers[i])) {
					continue
				}
				err := s.e.Client.ContainerKill(ctx, ob.Containers[i].ID, "KILL")
				if err != nil && !client.IsNotFound(err) && !client.IsConflict(err) {
					s.fail(err)
				}
			}
		}()
	}
}
