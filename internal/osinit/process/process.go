// Package process starts the programs of the machine and reaps all of its
// processes: the first process inherits every orphan. A *Table* is the only one that
// waits for children, so nothing else in the program may start any. A *Service*
// is a program that is started again when it ends, later each time.
package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Table knows the children that somebody waits for.
type Table struct {
	mu      sync.Mutex
	waiting map[int]chan syscall.WaitStatus
}

// NewTable returns an empty table.
func NewTable() *Table { return &Table{waiting: map[int]chan syscall.WaitStatus{}} }

// Run reaps until ctx is done.
func (t *Table) Run(ctx context.Context) error {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, unix.SIGCHLD)
	defer signal.Stop(ch)
	for {
		t.reap()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ch:
		}
	}
}

func (t *Table) reap() {
	for {
		var status syscall.WaitStatus
		// Held over the call: who starts a child enters it before it can be reaped.
		t.mu.Lock()
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if pid > 0 {
			if ch := t.waiting[pid]; ch != nil && (status.Exited() || status.Signaled()) {
				delete(t.waiting, pid)
				ch <- status
			}
		}
		t.mu.Unlock()
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if pid <= 0 {
			return
		}
	}
}

// Drain reaps until no child is left, or for so long.
func (t *Table) Drain(patience time.Duration) {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		t.reap()
		if _, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); errors.Is(err, syscall.ECHILD) {
			return
		}
	}
}

// Program is what to start.
type Program struct {
	Path string
	Args []string
	Env  []string
	Dir  string
	// Input is standard input, Output takes standard output and error; nil is /dev/null.
	Input, Output *os.File
	// Extra are further descriptors, from 3 on.
	Extra []*os.File
	// OOMScoreAdj is written before it runs on.
	OOMScoreAdj int
	// Attr is added to.
	NewSession bool
}

// Process is a child.
type Process struct {
	PID  int
	done chan syscall.WaitStatus
}

// Start starts a program.
func (t *Table) Start(p Program) (*Process, error) {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	out := p.Output
	if out == nil {
		out = null
	}
	in := p.Input
	if in == nil {
		in = null
	}
	files := []uintptr{in.Fd(), out.Fd(), out.Fd()}
	for _, f := range p.Extra {
		files = append(files, f.Fd())
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	pid, err := syscall.ForkExec(p.Path, append([]string{p.Path}, p.Args...), &syscall.ProcAttr{
		Dir: p.Dir, Env: p.Env, Files: files,
		Sys: &syscall.SysProcAttr{Setsid: p.NewSession},
	})
	if err != nil {
		return nil, fmt.Errorf("cannot start %s: %w", p.Path, err)
	}
	return t.enter(pid, p.OOMScoreAdj), nil
}

// Adopt makes a child that was started before a process of the table.
func (t *Table) Adopt(pid, oomScoreAdj int) *Process {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.enter(pid, oomScoreAdj)
}

// enter notes a child; mu is held.
func (t *Table) enter(pid, oomScoreAdj int) *Process {
	ch := make(chan syscall.WaitStatus, 1)
	t.waiting[pid] = ch
	if oomScoreAdj != 0 {
		os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), fmt.Appendf(nil, "%d", oomScoreAdj), 0) // best effort: it may have ended
	}
	return &Process{PID: pid, done: ch}
}

// Done gives the status when the process has ended.
func (p *Process) Done() <-chan syscall.WaitStatus { return p.done }

// Describe says how a process ended.
func Describe(s syscall.WaitStatus) string {
	if s.Signaled() {
		return "killed by " + unix.SignalName(s.Signal())
	}
	return fmt.Sprintf("exit status %d", s.ExitStatus())
}

// Service keeps a program running.
type Service struct {
	Table   *Table
	Program Program
	// First, if set, is the program's first process, which runs already.
	First *Process
	// Changed is called after each start and end.
	Changed func(State)
	// Log takes what happens.
	Log func(format string, args ...any)
}

// State is a service's.
type State struct {
	PID      int
	Restarts int
	LastExit string
	Since    time.Time
}

// The back-off between starts: it doubles from first to most, and begins anew
// after steady.
const (
	first  = 200 * time.Millisecond
	most   = 30 * time.Second
	steady = 20 * time.Second
)

// Run starts the program, and again when it ends, until ctx is done; then it asks
// the program to end and waits for it, no longer than patience.
func (s *Service) Run(ctx context.Context, patience time.Duration) {
	state, wait := State{}, first
	for ctx.Err() == nil {
		began := time.Now()
		p, err := s.First, error(nil)
		if s.First = nil; p == nil {
			p, err = s.Table.Start(s.Program)
		}
		if err != nil {
			state.LastExit = err.Error()
			s.Log("%v", err)
		} else {
			state.PID, state.Since = p.PID, began
			s.Changed(state)
			select {
			case status := <-p.Done():
				state.LastExit = Describe(status)
			case <-ctx.Done():
				unix.Kill(p.PID, unix.SIGTERM)
				select {
				case <-p.Done():
				case <-time.After(patience):
					unix.Kill(p.PID, unix.SIGKILL)
					<-p.Done()
				}
				state.PID = 0
				s.Changed(state)
				return
			}
			s.Log("%s ended: %s", s.Program.Path, state.LastExit)
		}
		state.PID = 0
		state.Restarts++
		s.Changed(state)
		if time.Since(began) > steady {
			wait = first
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, most)
	}
}
