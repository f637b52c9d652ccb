package osinit

import (
	"context"
	"encoding/json"
	"os"
	"time"

	"github.com/cloudos-io/cloudos/internal/daemon/await"
	"github.com/cloudos-io/cloudos/internal/osinit/process"
)

// waitingEngine is an engine that was started before it is known how it is to run: a
// program of its size takes its time to get to its first instruction of ours, and the
// disk, the configuration and the modules take theirs.
type waitingEngine struct {
	process *process.Process
	tell    *os.File
	out, in *os.File // its output
}

func (e *waitingEngine) close() {
	e.tell.Close()
	e.out.Close()
	e.in.Close()
}

const engineOOMScore = -900

// engineProgram is how the engine is started; shim/first.c starts the first of VM mode alike.
func (m *machine) engineProgram(output *os.File) process.Program {
	return process.Program{Path: "/bin/servind", Output: output, Dir: "/", OOMScoreAdj: engineOOMScore, NewSession: true,
		Env: []string{"PATH=/bin", "HOME=/var/root", "TMPDIR=/var/tmp"}}
}

// prestart starts the engine, which waits until it is told how to run.
func (m *machine) prestart() {
	e := new(waitingEngine)
	var err error
	if e.out, e.in, err = os.Pipe(); err != nil {
		m.problem(err)
		return
	}
	wait, tell, err := os.Pipe()
	if err != nil {
		e.out.Close()
		e.in.Close()
		m.problem(err)
		return
	}
	defer wait.Close()
	p := m.engineProgram(e.in)
	p.Env = append(p.Env, await.Env)
	p.Extra = []*os.File{wait}
	if e.process, err = m.table.Start(p); err != nil {
		// It is started again when it is its turn.
		m.log.Printf("%v", err)
		e.tell = tell
		e.close()
		return
	}
	e.tell = tell
	m.prepared = e
}

// dismiss ends an engine that is not to run.
func (m *machine) dismiss() {
	if e := m.prepared; e != nil {
		e.close()
		m.prepared = nil
	}
}

// runEngine keeps the engine running until ctx is done.
func (m *machine) runEngine(ctx context.Context) {
	env := "SSL_CERT_FILE=" + trusted()
	var r, w *os.File
	var first *process.Process
	if e := m.prepared; e != nil {
		m.prepared = nil
		r, w, first = e.out, e.in, e.process
		// One that has ended reads nothing: it is started again like any other.
		if err := json.NewEncoder(e.tell).Encode(await.Order{Args: m.engineArgs, Env: []string{env}}); err != nil {
			m.log.Printf("cannot tell the engine how to run: %v", err)
		}
		// It ends when networks can be made, and containers find what the host shares.
		go func() {
			defer e.tell.Close()
			select {
			case <-m.ready:
			case <-ctx.Done():
			case <-time.After(15 * time.Second): // it waits for them itself
			}
			m.loadNetworkModules()
			m.awaitHost(ctx)
		}()
	} else {
		m.loadNetworkModules()
		var err error
		if r, w, err = os.Pipe(); err != nil {
			m.problem(err)
			return
		}
	}
	defer r.Close()
	defer w.Close()
	go m.engineLog.fill(r)
	p := m.engineProgram(w)
	p.Args, p.Env = m.engineArgs, append(p.Env, env)
	s := process.Service{
		Table: m.table, Program: p, First: first, Log: m.log.Printf,
		Changed: func(s process.State) {
			m.mu.Lock()
			m.engine.PID, m.engine.Running, m.engine.Restarts, m.engine.LastExit = s.PID, s.PID != 0, s.Restarts, s.LastExit
			if s.PID == 0 {
				m.engine.Ready = false
			}
			m.mu.Unlock()
			m.change()
			if s.PID != 0 {
				go m.awaitEngine(ctx, s.PID)
			}
		},
	}
	s.Run(ctx, 10*time.Second)
}
